"""From data specs to a tokenizer and packed tokens, and the folder that keeps them with a run."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from transformers import PreTrainedTokenizerBase

from secateur.data.corpus import Document, embedded_specs, read_documents
from secateur.data.packing import PackedTokens, pack
from secateur.data.split import Corpus, Progress, build_corpus
from secateur.data.tokenizer import load_tokenizer, separator, train_tokenizer
from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.digest import sha256_of
from secateur.files.json import read_json
from secateur.files.new_folder import copy_file, written_beside
from secateur.files.records import as_record
from secateur.files.refused import refused_by_the_disk

FORMAT = "secateur-data"
VERSION = 1
TOKENIZER = "tokenizer"  # the folder of it
RECORD = "data.json"

# A validation loss over fewer blocks is noise, and none is an error; tokenizers make 3 to 5 bytes of text into a token.
MIN_VALIDATION_BLOCKS = 8
BYTES_PER_TOKEN = 4


class TokenFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of packed tokens beside data.json, and their digest."""

    file: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+\.safetensors$", description="a file beside data.json")]
    digest: str


TokenizerFile = Annotated[str, msgspec.Meta(pattern=r"^[^/\0]+$", description="a file in tokenizer/")]


class DataRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """data.json: which files hold the tokens of a run, and how they were made.

    tokenizer: the SHA-256 of its files; None where an earlier release wrote it.
    """

    format: Literal["secateur-data"]
    version: Literal[1]
    train: TokenFile
    validation: dict[str, TokenFile]
    report: dict[str, Any]
    tokenizer: dict[TokenizerFile, str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedData:
    """What training needs of its data. `report` is plain JSON; `validation` is by domain."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedTokens
    validation: dict[str, PackedTokens]
    report: dict[str, Any]


def prepare(
    specs: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int = 4096,
    sequence_length: int,
    validation_share: float = 0.02,
    seed: int = 0,
    max_bytes: int | None = None,
    text_key: str = "text",
    split: str = "train",
    progress: Progress | None = None,
) -> PreparedData:
    """Read, de-duplicate, split, tokenise and pack the data that `specs` name.

    Without `tokenizer`, a byte-level BPE of `vocab_size` is trained on the training text. Small domains give more
    to validation than `validation_share`: about 8 blocks of text, at most half of their documents. `progress` is
    called with (description, done, total or None).

    Raises:
        SecateurError: whatever `read_documents`, `build_corpus`, `train_tokenizer` or `pack` refuse.
    """
    if sequence_length < 2:
        raise SecateurError(f"sequence_length: found {sequence_length}, expected at least 2")
    if tokenizer is not None:
        separator(tokenizer)  # before the data is read
    skipped: list[str] = []
    corpus = build_corpus(
        read_documents(specs, text_key=text_key, split=split, skipped=skipped),
        validation_share=validation_share,
        seed=seed,
        max_bytes=max_bytes,
        min_validation_bytes=MIN_VALIDATION_BLOCKS * BYTES_PER_TOKEN * sequence_length,
        progress=progress,
    )
    if not corpus.train:
        raise SecateurError("data: found no document for training, expected a lower validation_share or more documents")
    if tokenizer is None:
        if progress is not None:
            progress("train tokenizer", 0, 1)
        tokenizer = train_tokenizer((document.text for document in corpus.train), vocab_size=vocab_size)
        if progress is not None:
            progress("train tokenizer", 1, 1)
    train = pack(tokenizer, corpus.train, sequence_length=sequence_length, name="training documents", progress=progress)
    validation = {
        domain: pack(
            tokenizer,
            [document for document in corpus.validation if document.domain == domain],
            sequence_length=sequence_length,
            name=f"validation documents of domain {domain!r}",
            progress=progress,
        )
        for domain in sorted({document.domain for document in corpus.validation})
    }
    report = {
        "domains": _domains(corpus, train, validation),
        "duplicates_removed": corpus.num_duplicates,
        "documents_found": corpus.num_documents,
        "undecodable_skipped": len(skipped),
        "digest": corpus.digest,
        "sources": list(specs or embedded_specs()),
        "python": platform.python_version(),
        "sequence_length": sequence_length,
        "vocab_size": len(tokenizer),
        "validation_share": validation_share,
        "seed": seed,
        "max_bytes": max_bytes,
    }
    return PreparedData(tokenizer=tokenizer, train=train, validation=validation, report=report)


def _domains(corpus: Corpus, train: PackedTokens, validation: dict[str, PackedTokens]) -> dict[str, dict[str, int]]:
    documents, num_bytes = _totals((*corpus.train, *corpus.validation))
    validation_documents, _ = _totals(corpus.validation)
    return {
        domain: {
            "documents": documents[domain],
            "validation_documents": validation_documents[domain],
            "train_tokens": train.tokens_by_domain.get(domain, 0),
            "validation_tokens": validation[domain].num_tokens if domain in validation else 0,
            "bytes": num_bytes[domain],
        }
        for domain in sorted(documents)
    }


def _totals(documents: Iterable[Document]) -> tuple[Counter[str], Counter[str]]:
    count: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for document in documents:
        count[document.domain] += 1
        num_bytes[document.domain] += len(document.text.encode("utf-8"))
    return count, num_bytes


def save_prepared(prepared: PreparedData, folder: Path | str) -> None:
    """Write `tokenizer/`, `train.safetensors`, `validation-<domain>.safetensors` and `data.json`.

    The folder appears with everything in it or not at all: it is written beside its place and renamed.

    Raises:
        SecateurError: `folder` exists and is not an empty folder.
        OSError: the disk is full or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SecateurError(f"data folder {folder}: it exists and is not empty, expected a new folder")
    with written_beside(folder) as beside:
        _write(prepared, beside)


def _write(prepared: PreparedData, folder: Path) -> None:
    with refused_by_the_disk(folder / TOKENIZER):
        prepared.tokenizer.save_pretrained(folder / TOKENIZER)
    prepared.train.save(folder / "train.safetensors")
    names = _file_names(prepared.validation)
    for domain, packed in prepared.validation.items():
        packed.save(folder / names[domain])
    content = {
        "format": FORMAT,
        "version": VERSION,
        "train": {"file": "train.safetensors", "digest": prepared.train.digest()},
        "validation": {
            domain: {"file": names[domain], "digest": packed.digest()} for domain, packed in prepared.validation.items()
        },
        "report": prepared.report,
        "tokenizer": _digests(folder / TOKENIZER),
    }
    atomic_write(folder / RECORD, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _file_names(domains: Iterable[str]) -> dict[str, str]:
    """A file name for each domain: letters, digits, `_` and `-` only, and different where case does not count."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for domain in domains:
        stem = "validation-" + re.sub(r"[^A-Za-z0-9_-]", "_", domain)[:60]
        name, number = stem, 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        names[domain] = f"{name}.safetensors"
    return names


def load_prepared(folder: Path | str) -> PreparedData:
    """Read what `save_prepared` wrote, and check every token file against its digest.

    Raises:
        SecateurError: a file is missing, damaged, of another format, or not the one that was saved.
    """
    folder = Path(folder)
    record = read_record(folder / RECORD)
    _check_tokenizer(folder, record)
    return PreparedData(
        tokenizer=load_tokenizer(folder / TOKENIZER),
        train=_load_checked(folder, record.train),
        validation={domain: _load_checked(folder, entry) for domain, entry in record.validation.items()},
        report=record.report,
    )


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the files of the tokenizer in the prepared data `folder`, byte for byte.

    Raises:
        SecateurError: they are not the ones that were saved. OSError: the disk refused.
    """
    _check_tokenizer(folder, read_record(folder / RECORD))
    for path in sorted((folder / TOKENIZER).iterdir()):
        copy_file(path, target / path.name)


def _check_tokenizer(folder: Path, record: DataRecord) -> None:
    if not (folder / TOKENIZER).is_dir():
        raise SecateurError(f"{folder / TOKENIZER}: the folder is missing, expected the tokenizer of the data")
    if record.tokenizer is None:
        return
    found = _digests(folder / TOKENIZER)
    for name in sorted(record.tokenizer.keys() | found.keys()):
        now, before = found.get(name), record.tokenizer.get(name)
        if now != before:
            raise SecateurError(
                f"{folder / TOKENIZER / name}: found {_said(now)}, expected {_said(before)} by {folder / RECORD}"
            )


def _said(digest: str | None) -> str:
    return "no such file" if digest is None else f"SHA-256 {digest}"


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def read_record(path: Path) -> DataRecord:
    """What data.json says; nothing else is opened.

    Raises:
        SecateurError: it is missing, or not what `save_prepared` writes.
    """
    return as_record(read_json(path), DataRecord, str(path))


def _load_checked(folder: Path, entry: TokenFile) -> PackedTokens:
    packed = PackedTokens.load(folder / entry.file)
    if packed.digest() != entry.digest:
        raise SecateurError(
            f"{folder / entry.file}: found tokens with digest {packed.digest()}, expected {entry.digest} by "
            f"{folder / RECORD}"
        )
    return packed
