"""The tokens that a model is observed on: which text, how much of each domain, cut how.

Our reading, where published methods leave it open:
* packed (the default): the documents of a domain are joined, the end-of-text token after each where the tokenizer has
  one (chats end as their template ends them), and cut into blocks of one length without padding;
* not packed: every document is one sequence, cut at the length, begun as the tokenizer begins a text; padding is left
  out of all statistics;
* domains give the same number of sequences, as far as they have them; which ones, the seed decides.

Of a domain with far more text than that (`ROOM` characters for every token wanted; not packed: more documents than
sequences), the seed draws documents from all of it; of a single longer one the beginning is taken.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.batch import Batch
from secateur.data.chats import Chat, read_chats, tokens_of_chat
from secateur.data.corpus import Document, embedded_specs, read_documents
from secateur.data.tokenizer import encode
from secateur.errors import SecateurError

ROOM = 128  # characters of a domain that are tokenised for every token wanted of all; a token has 3 to 5
BATCH_DOCUMENTS = 256  # tokenised at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Sequences of tokens with their origin.

    sequences: (S,) int32 each, all of one length where they are packed. the others are filled up with token 0.
    domains: sequences of each, in their order. about: how they were made, as JSON.
    """

    sequences: tuple[Tensor, ...]
    packed: bool
    domains: Mapping[str, int]
    about: Mapping[str, Any]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the lengths and the tokens, as little-endian int32."""
        content = hashlib.sha256()
        for sequence in self.sequences:
            content.update(len(sequence).to_bytes(4, "little") + sequence.numpy().astype("<i4", copy=False).tobytes())
        return content.hexdigest()

    def batches(self, batch_size: int) -> list[Batch]:
        """The sequences in their order, at most `batch_size` in one; the shorter ones padded on the right."""
        groups = [self.sequences[at : at + batch_size] for at in range(0, len(self.sequences), batch_size)]
        return [Batch(input_ids=self._padded(group), attention_mask=self._mask(group)) for group in groups]

    def to_json(self) -> dict[str, Any]:
        """What a statistics file says of its data."""
        ends = iter(self.sequences)
        tokens = {name: sum(len(next(ends)) for _ in range(count)) for name, count in self.domains.items()}
        return {
            **self.about,
            "packed": self.packed,
            "domains": {name: {"sequences": count, "tokens": tokens[name]} for name, count in self.domains.items()},
            "tokens": self.num_tokens,
            "digest": self.digest,
        }

    def _padded(self, group: Sequence[Tensor]) -> Tensor:
        rows = [sequence.to(torch.int64) for sequence in group]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _mask(self, group: Sequence[Tensor]) -> Tensor | None:
        if self.packed:
            return None
        return torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(sequence), dtype=torch.int64) for sequence in group], True
        )


def calibrate(
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[str],
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    pack: bool = True,
    text_key: str = "text",
    split: str = "train",
) -> Calibration:
    """Draw `samples` sequences from the data that `specs` name; see `read_documents` for what a spec may be.

    A spec of .jsonl files with chat `messages` goes through the tokenizer's chat template. Without any spec it is the
    running Python's own standard library and its reference prose.

    Raises:
        SecateurError: a spec that names no text, chats without a template, or too little text for `samples`.
    """
    for name, value, least in (("samples", samples, 1), ("sequence_length", sequence_length, 2)):
        if value < least:
            raise SecateurError(f"{name}: found {value}, expected at least {least}")
    room = ROOM * samples * sequence_length
    texts = read_texts(specs, text_key, split)
    by_domain = _kept(texts, seed, _characters, room) if pack else _kept(texts, seed, lambda text: 1, samples)
    sequences: dict[str, list[Tensor]] = {}
    for domain, kept in by_domain.items():
        ids = token_lists(tokenizer, kept, room, special=not pack)
        cut = _blocks(ids, sequence_length) if pack else _single(ids, sequence_length)
        sequences[domain] = list(cut)
    shares = fair_shares({domain: len(found) for domain, found in sequences.items()}, samples)
    if sum(shares.values()) < samples:
        found = ", ".join(f"{domain} {len(sequence)}" for domain, sequence in sequences.items())
        what = f"blocks of {sequence_length} tokens" if pack else "documents"
        raise SecateurError(f"data: found {sum(map(len, sequences.values()))} {what} ({found}), expected {samples}")
    chosen = {domain: _drawn(found, shares[domain], f"{seed} {domain}") for domain, found in sequences.items()}
    return Calibration(
        sequences=tuple(sequence for found in chosen.values() for sequence in found),
        packed=pack,
        domains={domain: len(found) for domain, found in chosen.items()},
        about={
            "specs": list(specs or embedded_specs()),
            "samples": samples,
            "sequence_length": sequence_length,
            "seed": seed,
        },
    )


def fair_shares(available: Mapping[str, int], wanted: int) -> dict[str, int]:
    """How many each gives: the same number, but none more than it has; the first ones give what is left over."""
    shares = dict.fromkeys(available, 0)
    while wanted and (open_ := [name for name, share in shares.items() if share < available[name]]):
        each = max(1, wanted // len(open_))
        for name in open_[:wanted]:
            given = min(each, available[name] - shares[name])
            shares[name] += given
            wanted -= given
    return shares


def read_texts(specs: Sequence[str], text_key: str, split: str) -> Iterator[Document | Chat]:
    """What the specs name, in their order: chats where a spec is of chats, else documents; see `read_documents`."""
    for spec in specs or embedded_specs():
        yield from read_chats(spec, text_key) or read_documents([spec], text_key=text_key, split=split)


def _kept(
    texts: Iterator[Document | Chat], seed: int, size_of: Callable[[Document | Chat], int], room: int
) -> dict[str, list[Document | Chat]]:
    """Domain -> its documents in their order; where their sizes exceed `room`, those that the seed drew."""
    draw = random.Random(seed)
    drawn: dict[str, list[tuple[float, int, Document | Chat]]] = {}
    size: dict[str, int] = {}
    for number, text in enumerate(texts):
        mine = drawn.setdefault(text.domain, [])
        heapq.heappush(mine, (draw.random(), number, text))
        size[text.domain] = size.get(text.domain, 0) + size_of(text)
        while size[text.domain] > room and len(mine) > 1:
            size[text.domain] -= size_of(heapq.heappop(mine)[2])
    if not drawn:
        raise SecateurError("data: found no text, expected at least one document")
    return {domain: [text for _, _, text in sorted(mine, key=lambda entry: entry[1])] for domain, mine in drawn.items()}


def _drawn(found: Sequence[Tensor], count: int, seed: str) -> list[Tensor]:
    return [found[at] for at in sorted(random.Random(seed).sample(range(len(found)), count))]


def _characters(text: Document | Chat) -> int:
    return len(text.text) if isinstance(text, Document) else len(str(text.messages))


def token_lists(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document | Chat], room: int | None, *, special: bool
) -> Iterator[list[int]]:
    """The tokens of each; of a plain text with an end token, or with those that the tokenizer adds if `special`.

    Of a plain text only the first `room` characters are read, where that is given.
    """
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) and not special else []
    for at in range(0, len(texts), BATCH_DOCUMENTS):
        group = texts[at : at + BATCH_DOCUMENTS]
        plain = [text.text[:room] for text in group if isinstance(text, Document)]
        encoded = iter(encode(tokenizer, plain, special=special) if plain else [])
        for text in group:
            yield [*next(encoded), *end] if isinstance(text, Document) else tokens_of_chat(tokenizer, text)


def _blocks(lists: Iterator[list[int]], length: int) -> Iterator[Tensor]:
    stream = array("i")
    for ids in lists:
        stream.extend(ids)
    count = len(stream) // length
    if count:
        yield from torch.frombuffer(stream, dtype=torch.int32, count=count * length).view(count, length)


def _single(lists: Iterator[list[int]], length: int) -> Iterator[Tensor]:
    for ids in lists:
        if ids:
            yield torch.tensor(ids[:length], dtype=torch.int32)
