"""An archive is read as far as its own numbers can be true; what could fill the memory is refused before it does."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile

import pytest
import torch

from secateur.errors import SecateurError
from secateur.files.archive import load_plain, members_of

END = struct.Struct("<4s4H2LH")  # of the record at the end of an archive


def archive(*names: str, packing: int = zipfile.ZIP_STORED, content: bytes = b"0123456789") -> io.BytesIO:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", packing) as written:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name in names:
            written.writestr(name, content)
    return file


def test_members_are_known_by_name() -> None:
    assert {name: one.file_size for name, one in members_of(archive("a", "b"), "x")[1].items()} == {"a": 10, "b": 10}


def test_a_name_that_is_there_twice_is_refused() -> None:
    with pytest.raises(SecateurError, match="x: a name is in the archive twice"):
        members_of(archive("a", "a"), "x")


def test_members_that_share_their_bytes_are_refused() -> None:
    """Their list says of one and the same bytes that they are many files."""
    data = archive("a", content=b"0" * 1000).getvalue()
    entries, end = data[data.index(b"PK\x01\x02") : data.index(b"PK\x05\x06")], END.unpack(data[-END.size :])
    many = b"".join(entries[:-1] + bytes([ord("a") + number]) for number in range(20))
    head = data[: data.index(entries)]
    file = io.BytesIO(head + many + END.pack(end[0], 0, 0, 20, 20, len(many), len(head), 0))
    with pytest.raises(SecateurError, match="x: what is in the archive overlaps"):
        members_of(file, "x")


def test_a_stored_member_has_the_bytes_that_it_says() -> None:
    data = bytearray(archive("a").getvalue())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<L", 2**31)
    with pytest.raises(SecateurError, match=rf"'a' would have {2**31} bytes, expected at most 10"):
        members_of(io.BytesIO(bytes(data)), "x")


def test_tensors_of_a_packed_archive_are_refused_and_of_a_plain_one_read() -> None:
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(3)}, plain)
    found = load_plain(plain, "x")
    assert isinstance(found, dict)
    assert found["a"].tolist() == [0, 1, 2]
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(SecateurError, match=r"is packed, which torch\.save does not do"):
        load_plain(packed, "x")
