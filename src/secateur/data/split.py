"""Which documents are trained on, in which order, and which are kept for validation?

Each document has a position in [0, 1): a hash of the seed and of its text. Documents are ordered by position; those
below `validation_share` are for validation, the rest for training. So the answer for one document depends neither on
the other documents nor on the order in which files were read.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from secateur.data.corpus import Document
from secateur.errors import SecateurError

Progress = Callable[[str, int, int | None], None]
"""Called with (description, done, total or None)."""

POSITIONS = 2**64
FORGET_ABOVE_BYTES = 64 * 2**20
PROGRESS_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents ready to be tokenised.

    `num_documents` counts the different documents found (before `max_bytes`), `num_duplicates` the exact copies that
    were left out. `digest` is the sha256 of the kept texts, their domains and their order.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    num_duplicates: int
    num_documents: int
    digest: str


@dataclass(kw_only=True, slots=True)
class _Entry:
    position: int
    text_digest: bytes
    num_bytes: int
    document: Document
    """Its text is emptied once it is certain that the document will not be kept."""


def build_corpus(
    documents: Iterable[Document],
    *,
    validation_share: float = 0.02,
    seed: int = 0,
    max_bytes: int | None = None,
    min_validation_bytes: int = 1,
    progress: Progress | None = None,
) -> Corpus:
    """Remove exact duplicates (the first one read stays), split by document and shuffle, all by hash.

    A domain whose documents below `validation_share` have fewer than `min_validation_bytes` (UTF-8) gives its next
    documents in order as well, at most half of them in all and at least one; one document of a domain always stays
    for training. Adding documents can move only such borderline ones.

    With `max_bytes`, training documents are taken in order until their UTF-8 bytes reach it (the last one is whole),
    and validation documents until they reach `max_bytes * validation_share / (1 - validation_share)`, but never fewer
    than `min_validation_bytes` ask for. Texts beyond that are
    not held in memory while the rest is read.

    Raises:
        SecateurError: an argument out of range, no document, a domain with a single document, or a text that UTF-8
            cannot hold (a lone surrogate).
    """
    if not 0 < validation_share < 1:
        raise SecateurError(f"validation_share: found {validation_share}, expected a number above 0 and below 1")
    if max_bytes is not None and max_bytes < 1:
        raise SecateurError(f"max_bytes: found {max_bytes}, expected at least 1")
    threshold = int(validation_share * POSITIONS)
    floor = max(1, min_validation_bytes)
    entries: dict[bytes, _Entry] = {}
    num_read = held_bytes = kept_bytes = 0
    for document in documents:
        num_read += 1
        if progress is not None and num_read % PROGRESS_EVERY == 0:
            progress("read documents", num_read, None)
        entry = _entry(document, seed)
        if entry.text_digest in entries:
            continue
        entries[entry.text_digest] = entry
        held_bytes += entry.num_bytes
        if max_bytes is not None and held_bytes > 2 * kept_bytes + FORGET_ABOVE_BYTES:
            held_bytes = kept_bytes = _forget(entries.values(), threshold, floor, max_bytes)
    if not entries:
        raise SecateurError("data: found no document, expected at least two in each domain")
    if progress is not None:
        progress("read documents", num_read, num_read)

    ordered = _in_order(entries.values())
    chosen = _validation(ordered, threshold, floor)
    for_training = [entry for entry in ordered if entry.text_digest not in chosen]
    for_validation = [entry for entry in ordered if entry.text_digest in chosen]
    if max_bytes is not None:
        for_training = [entry for entry, before in _with_bytes_before(for_training) if before < max_bytes]
        limit = max_bytes * validation_share / (1 - validation_share)
        asked_for = {entry.text_digest for entry in _first_of_domains(ordered, floor)}
        for_validation = [
            entry
            for entry, before in _with_bytes_before(for_validation)
            if before < limit or entry.text_digest in asked_for
        ]
    return Corpus(
        train=tuple(entry.document for entry in for_training),
        validation=tuple(entry.document for entry in for_validation),
        num_duplicates=num_read - len(entries),
        num_documents=len(entries),
        digest=_digest(for_training, for_validation),
    )


def _entry(document: Document, seed: int) -> _Entry:
    try:
        data = document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SecateurError(
            f"{document.source}: the text holds a lone surrogate, expected text fit for UTF-8"
        ) from error
    text_digest = hashlib.sha256(data).digest()
    position = int.from_bytes(hashlib.sha256(f"{seed}:".encode() + text_digest).digest()[:8], "big")
    return _Entry(position=position, text_digest=text_digest, num_bytes=len(data), document=document)


def _in_order(entries: Iterable[_Entry]) -> list[_Entry]:
    return sorted(entries, key=lambda entry: (entry.position, entry.text_digest))


def _with_bytes_before(entries: Iterable[_Entry]) -> Iterator[tuple[_Entry, int]]:
    before = 0
    for entry in entries:
        yield entry, before
        before += entry.num_bytes


def _first_of_domains(ordered: Iterable[_Entry], floor: int) -> Iterator[_Entry]:
    """The first documents of each domain, until they have `floor` bytes."""
    before: dict[str, int] = defaultdict(int)
    for entry in ordered:
        if before[entry.document.domain] < floor:
            yield entry
        before[entry.document.domain] += entry.num_bytes


def _validation(ordered: Iterable[_Entry], threshold: int, floor: int) -> set[bytes]:
    """Text digests of the validation documents: in each domain, the first ones in order."""
    domains: dict[str, list[_Entry]] = defaultdict(list)
    for entry in ordered:
        domains[entry.document.domain].append(entry)
    chosen: set[bytes] = set()
    for domain, entries in domains.items():
        if len(entries) < 2:
            raise SecateurError(
                f"domain {domain!r}: found 1 document ({entries[0].document.source}) after removing duplicates, "
                f"expected at least 2 to split by document; files share a domain when written {domain}=PATH"
            )
        below = sum(entry.position < threshold for entry in entries)
        wanted = sum(before < floor for _, before in _with_bytes_before(entries))
        count = min(max(below, min(wanted, len(entries) // 2)), len(entries) - 1)
        chosen.update(entry.text_digest for entry in entries[:count])
    return chosen


def _forget(entries: Iterable[_Entry], threshold: int, floor: int, max_bytes: int) -> int:
    """Empty the texts that no further document can bring back below `max_bytes`; return the bytes still held.

    Documents that a domain may still give to validation do not count against `max_bytes`. A document that comes later
    can only make another one count, never stop it, so what is beyond the limit now stays beyond it.
    """
    ordered = _in_order(entries)
    spared = {entry.text_digest for entry in _first_of_domains(ordered, floor)}
    candidates = [entry for entry in ordered if entry.position >= threshold and entry.text_digest not in spared]
    beyond = {entry.text_digest for entry, before in _with_bytes_before(candidates) if before >= max_bytes}
    held = 0
    for entry in ordered:
        if entry.text_digest not in beyond:
            held += entry.num_bytes
        elif entry.document.text:
            entry.document = Document(text="", source=entry.document.source, domain=entry.document.domain)
    return held


def _digest(train: Iterable[_Entry], validation: Iterable[_Entry]) -> str:
    content = hashlib.sha256()
    for part, entries in (("train", train), ("validation", validation)):
        for entry in entries:
            content.update(f"{part}:{entry.text_digest.hex()}:{entry.document.domain}\n".encode())
    return content.hexdigest()
