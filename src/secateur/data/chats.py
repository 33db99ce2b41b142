"""Which data specs hold chats, and what are the messages of each?

A chat file is .jsonl with one object a line that has a list of `messages`, each with a `role` and a `content`, and no
plain text. A folder or a glob holds chats when all text files in it are .jsonl and the first one is of chats.
"""

from __future__ import annotations

import codecs
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.corpus import READERS
from secateur.data.tokenizer import named
from secateur.errors import SecateurError
from secateur.files.json import parse_json
from secateur.files.limits import MAX_JSON
from secateur.files.opened import opened

MESSAGES = "messages"
BOM = codecs.BOM_UTF8


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One chat: what its file says of the messages, and where that is."""

    messages: Any
    source: str
    domain: str


def read_chats(spec: str, text_key: str) -> Iterator[Chat] | None:
    """The chats that a spec, a path after an optional `domain=`, names; None where it names something else.

    Raises:
        SecateurError: a line that is not JSON, or no chat though the first line is one.
    """
    domain, location = _split(spec)
    path = Path(location).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    else:
        names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
    if not files or any(file.suffix.lower() != ".jsonl" for file in files) or not _is_chat(files[0], text_key):
        return None
    return _chats(files, domain or (path.resolve().name if path.is_dir() else files[0].stem))


def tokens_of_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """The tokens that the tokenizer's chat template makes of a chat, special ones included.

    Raises:
        SecateurError: the tokenizer has no template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise SecateurError(
            f"{chat.source}: found chat messages, but the model's tokenizer has no chat template; expected plain text"
        )
    try:
        ids: Any = tokenizer.apply_chat_template(chat.messages, tokenize=True, return_dict=False)
    except Exception as error:  # templates are programs that raise what they like
        raise SecateurError(
            f"{chat.source}: the chat template of {named(tokenizer)} refuses the messages ({error})"
        ) from error
    if not ids:
        raise SecateurError(
            f"{chat.source}: the tokenizer {named(tokenizer)} makes no token of the messages; expected the one that "
            "the model was trained with"
        )
    return list(ids)


def _split(spec: str) -> tuple[str | None, str]:
    matched = re.fullmatch(r"([^/\\=\s]+)=(.+)", spec, flags=re.DOTALL)
    return (None, spec) if matched is None or Path(spec).exists() else (matched[1], matched[2])


def _is_chat(file: Path, text_key: str) -> bool:
    """By its first line; what is wrong with a line is said when it is read."""
    with opened(file) as lines:
        first = next((line for line in iter(lambda: lines.readline(MAX_JSON + 1), b"") if line.strip()), b"")
    try:
        row = parse_json(first.removeprefix(BOM), str(file))
    except SecateurError:
        return False
    return isinstance(row, dict) and MESSAGES in row and text_key not in row


def _chats(files: list[Path], domain: str) -> Iterator[Chat]:
    for file in files:
        with opened(file) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_JSON + 1), b""), start=1):
                if line.strip():
                    source = f"{file}:{number}"
                    yield Chat(messages=_messages(line, source), source=source, domain=domain)


def _messages(line: bytes, source: str) -> Any:
    row = parse_json(line.removeprefix(BOM), source)
    messages = row.get(MESSAGES) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise SecateurError(
            f"{source}: found {messages!r:.80}, expected a list of messages under {MESSAGES!r}, each with role and "
            "content"
        )
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
