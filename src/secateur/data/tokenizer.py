"""Which tokenizer turns the text into ids: one trained on the data, or one from a folder?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.errors import SecateurError
from secateur.files.json import read_json

END_OF_TEXT = "<|endoftext|>"
NUM_BYTE_VALUES = 256
# transformers makes an empty tokenizer of a folder that holds only a model's config.json, so look for a vocabulary.
VOCABULARY_PATTERNS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
WHOLE = "tokenizer.json"  # of the tokenizers library, which reads nothing else
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, max_characters: int = 8_000_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the first `max_characters` of `texts`; the same texts give the same tokenizer.

    Every text can be encoded (all 256 bytes are in the vocabulary, there is no unknown token). `<|endoftext|>`, id 0,
    is the begin, end and padding token. The vocabulary is smaller than `vocab_size` when the text has too few pairs.

    Raises:
        SecateurError: `vocab_size` below the 256 bytes and the end token, or no text.
    """
    smallest = NUM_BYTE_VALUES + 1
    if vocab_size < smallest:
        raise SecateurError(
            f"vocab_size: found {vocab_size}, expected at least {smallest} (256 bytes and {END_OF_TEXT})"
        )
    sample = list(_first_characters(texts, max_characters))
    if not any(sample):
        raise SecateurError("tokenizer: found no text to train on, expected at least one document")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer=trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a local folder; nothing is downloaded and no code from the folder is run.

    Raises:
        SecateurError: no such folder, no vocabulary in it, or transformers cannot read it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SecateurError(f"tokenizer {folder}: no such folder; expected a local folder with a tokenizer")
    if not any(path.is_file() for pattern in VOCABULARY_PATTERNS for path in folder.glob(pattern)):
        other = ", or a config.json of a model that reads no text" if (folder / "config.json").is_file() else ""
        raise SecateurError(
            f"tokenizer {folder}: found no tokenizer, expected one of {', '.join(VOCABULARY_PATTERNS)} in the folder"
            f"{other}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        _find_fault(folder)
        raise SecateurError(f"tokenizer {_with_files(folder, but=WHOLE)}: cannot be loaded ({error})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SecateurError(f"tokenizer {folder}: found {type(tokenizer).__name__}, expected a transformers tokenizer")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise SecateurError(
            f"{folder / BESIDE[0]}: model_max_length is {tokenizer.model_max_length!r:.80}, expected a number"
        )
    return tokenizer


def named(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a message calls a tokenizer: its folder and the files that it may be read from, where it has one."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return _with_files(Path(name)) if Path(name).is_dir() else str(name)


def _with_files(folder: Path, *, but: str = "") -> str:
    found = sorted({path.name for pattern in VOCABULARY_PATTERNS for path in folder.glob(pattern)})
    found += [name for name in BESIDE if (folder / name).is_file()]
    listed = ", ".join([name for name in found if name != but] or found)
    return f"{folder} ({listed})" if listed else str(folder)


def _find_fault(folder: Path) -> None:
    """Raises SecateurError: a file is at fault by itself; transformers does not say which it is about."""
    for path in sorted(folder.glob("*.json")):
        read_json(path)
    whole = folder / WHOLE
    if whole.is_file():
        try:
            Tokenizer.from_file(str(whole))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise SecateurError(f"tokenizer {whole}: cannot be loaded ({error})") from error


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-text token that separates documents.

    Raises:
        SecateurError: the tokenizer has none.
    """
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise SecateurError(
            f"tokenizer {named(tokenizer)}: found eos_token_id {eos_id!r:.80}, expected an end-of-text token between "
            "documents"
        )
    return eos_id


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The tokens of each text, with those that the tokenizer adds if `special`; what spells one out in a text is text.

    Raises:
        SecateurError: the tokenizer cannot encode them, or makes no token of any.
    """
    options: dict[str, Any] = {
        "add_special_tokens": special,
        "split_special_tokens": True,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    try:
        ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SecateurError(f"tokenizer {named(tokenizer)}: it cannot encode the text ({error})") from error
    written = next((text for text in texts if text.strip()), None)
    if written is not None:
        nothing = tokenizer([""], **options)["input_ids"][0]
        if all(one == nothing for one in ids):
            unknown = "no token for what it does not know" if tokenizer.unk_token_id is None else "an unknown token"
            raise SecateurError(
                f"tokenizer {named(tokenizer)}: it makes no token of {len(texts)} texts (one begins with "
                f"{written[:30]!r}); it has {len(tokenizer)} tokens and {unknown}: expected the tokenizer that the "
                "model was trained with"
            )
    return ids


def check_ids(largest: int, vocab_size: int, folder: Path) -> None:
    """Raises SecateurError: the tokenizer of a model's folder made an id that is no row of the model's embedding."""
    if largest >= vocab_size:
        raise SecateurError(
            f"tokenizer {_with_files(folder)}: it makes a token of id {largest}, but its vocabulary is {vocab_size} by "
            "config.json"
        )


def check_vocabulary_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that every id of the tokenizer is a row of the model's embedding.

    Raises:
        SecateurError: more tokens than `vocab_size` of the model, or no end-of-text token.
    """
    separator(tokenizer)
    largest = max(tokenizer.get_vocab().values(), default=-1) + 1
    num_tokens = max(len(tokenizer), largest)
    if num_tokens > vocab_size:
        raise SecateurError(
            f"tokenizer {named(tokenizer)}: found {num_tokens} tokens, expected at most the model's vocab_size of "
            f"{vocab_size}"
        )


def _first_characters(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    left = max_characters
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)
