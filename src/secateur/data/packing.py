"""How do documents become blocks of tokens of one length?

Legend: N blocks, S tokens in a block.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from secateur.data.corpus import Document
from secateur.data.split import Progress
from secateur.data.tokenizer import encode, separator
from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import parse_json
from secateur.files.records import Count, as_record

FORMAT = "secateur-tokens"
VERSION = 1
BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """Blocks of tokens without padding.

    `num_tokens` is N x S; `num_dropped` counts the tokens after the last whole block. `tokens_by_domain` counts all of
    them with their separators, so its sum is num_tokens + num_dropped. `num_documents` counts the documents begun.
    """

    blocks: Tensor
    """(N, S) int32"""
    num_documents: int
    num_tokens: int
    num_dropped: int
    tokens_by_domain: dict[str, int]

    def digest(self) -> str:
        """sha256 (hex) of the shape and of the tokens as little-endian int32."""
        content = hashlib.sha256(f"{tuple(self.blocks.shape)}\n".encode())
        content.update(self.blocks.numpy().astype("<i4", copy=False).data)
        return content.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: beside `path`, flushed, then renamed."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "num_documents": self.num_documents,
            "num_dropped": self.num_dropped,
            "tokens_by_domain": self.tokens_by_domain,
        }
        # One metadata entry: with several, safetensors writes them in an order that changes from run to run.
        metadata = {"secateur": json.dumps(header, sort_keys=True)}
        atomic_write(Path(path), save({"blocks": self.blocks}, metadata=metadata))

    @classmethod
    def load(cls, path: Path | str) -> PackedTokens:
        """Read what `save` wrote.

        Raises:
            SecateurError: the file is missing, damaged or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = parse_json((file.metadata() or {}).get("secateur", "{}"), str(path))
                header = as_record(about, PackedHeader, str(path))
                blocks = file.get_tensor("blocks")
        except (OSError, SafetensorError) as error:
            raise SecateurError(f"{path}: not a readable file of packed tokens ({error})") from error
        if blocks.dtype != torch.int32 or blocks.dim() != 2:
            raise SecateurError(f"{path}: found blocks {blocks.dtype} {tuple(blocks.shape)}, expected (N, S) of int32")
        return cls(
            blocks=blocks,
            num_documents=header.num_documents,
            num_tokens=blocks.numel(),
            num_dropped=header.num_dropped,
            tokens_by_domain=header.tokens_by_domain,
        )


class PackedHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of packed tokens says beside the blocks."""

    format: Literal["secateur-tokens"]
    version: Literal[1]
    num_documents: Count
    num_dropped: Count
    tokens_by_domain: dict[str, Count]


class BlockDataset(Dataset[dict[str, Tensor]]):
    """One block an item: `input_ids` and `labels`, both (S,) int64; no attention mask, as nothing is padded."""

    def __init__(self, packed: PackedTokens) -> None:
        self.blocks = packed.blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = self.blocks[index].to(torch.int64)
        return {"input_ids": input_ids, "labels": input_ids.clone()}


def pack(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    sequence_length: int,
    max_tokens: int | None = None,
    name: str = "documents",
    progress: Progress | None = None,
) -> PackedTokens:
    """Join the tokens of `documents`, the end-of-text id after each, and cut them into blocks of `sequence_length`.

    Special tokens that are spelled out in a text are encoded as plain text. A document above 2^20 characters is
    tokenised in pieces that end with a line, so that memory stays bounded. With `max_tokens`, tokenising stops as soon
    as it is reached and the blocks hold at most that many. `name` says in errors and progress what is packed.

    Raises:
        SecateurError: a length below 2, a tokenizer without end-of-text token, or too few tokens for one block.
    """
    if sequence_length < 2:
        raise SecateurError(f"sequence_length: found {sequence_length}, expected at least 2")
    if max_tokens is not None and max_tokens < sequence_length:
        raise SecateurError(f"max_tokens: found {max_tokens}, expected at least one block of {sequence_length}")
    eos_id = separator(tokenizer)
    total = len(documents) if isinstance(documents, Sized) else None
    stream = array("i")
    num_documents = 0
    tokens_by_domain: Counter[str] = Counter()
    for batch in _batches(_pieces(documents)):
        for piece, ids in zip(batch, encode(tokenizer, [piece.text for piece in batch]), strict=True):
            stream.extend(ids)
            if piece.ends:
                stream.append(eos_id)
            num_documents += piece.begins
            tokens_by_domain[piece.domain] += len(ids) + piece.ends
            if max_tokens is not None and len(stream) >= max_tokens:
                break
        if progress is not None:
            progress(f"tokenise {name}", num_documents, total)
        if max_tokens is not None and len(stream) >= max_tokens:
            break
    usable = len(stream) if max_tokens is None else min(len(stream), max_tokens)
    num_blocks = usable // sequence_length
    if num_blocks == 0:
        raise SecateurError(
            f"{name}: found {len(stream)} tokens, expected at least one block of sequence_length {sequence_length}"
        )
    num_tokens = num_blocks * sequence_length
    blocks = torch.frombuffer(stream, dtype=torch.int32, count=num_tokens).view(num_blocks, sequence_length)
    return PackedTokens(
        blocks=blocks,
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_dropped=len(stream) - num_tokens,
        tokens_by_domain=dict(sorted(tokens_by_domain.items())),
    )


class _Piece(NamedTuple):
    text: str
    domain: str
    begins: bool
    ends: bool


def _pieces(documents: Iterable[Document]) -> Iterator[_Piece]:
    for document in documents:
        text, start = document.text, 0
        while True:
            end = start + BATCH_CHARACTERS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield _Piece(text[start:end], document.domain, start == 0, end >= len(text))
            if end >= len(text):
                break
            start = end


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        if batch and characters + len(piece.text) > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(piece)
        characters += len(piece.text)
    if batch:
        yield batch
