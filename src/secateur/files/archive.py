"""Zip archives, as .npz and torch.save use them, read without trust: what is in them is compared with their size."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import BinaryIO

from secateur.errors import SecateurError

MAX_PACKING = 100  # times that a large member may have been packed: arrays pack 2 to 20 times, a bomb 1000 times
SMALL = 2**26  # bytes of a member that may be packed as it likes
# what Python's reader of archives and of packed bytes raises at damage
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, struct.error, RuntimeError)


def members_of(file: BinaryIO, where: str) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """(the archive, what is in it by name), of which nothing takes much more memory than the file has bytes.

    Args:
        file: read from, as long as the archive is in use. where: its name in messages.

    Raises:
        SecateurError: no archive, a damaged one, a name twice, or bytes that are packed too often.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except (*DAMAGED, OSError) as error:
        raise SecateurError(f"{where}: not a whole zip archive ({error})") from error
    named = {member.filename: member for member in members}
    if len(named) < len(members):
        raise SecateurError(f"{where}: a name is in the archive twice")
    if sum(member.compress_size for member in members) > size:
        raise SecateurError(f"{where}: what is in the archive overlaps; it is damaged")
    for member in members:
        is_stored = member.compress_type == zipfile.ZIP_STORED
        most = member.compress_size if is_stored else max(SMALL, MAX_PACKING * member.compress_size)
        if member.file_size > most:
            raise SecateurError(
                f"{where}: {member.filename!r:.80} would have {member.file_size} bytes, expected at most {most} from "
                f"the {member.compress_size} in the archive"
            )
    return archive, named


def load_plain(file: BinaryIO, where: str) -> object:
    """Tensors and plain values that torch.save wrote; no code in it is run, and no room is made for what is not there.

    Raises:
        SecateurError: another file, a damaged one, one in torch's form from before 1.6, or one that names code.
    """
    import torch

    _, members = members_of(file, where)
    if packed := [name for name, member in members.items() if member.compress_type != zipfile.ZIP_STORED]:
        raise SecateurError(f"{where}: {packed[0]!r:.80} is packed, which torch.save does not do")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the archive, of the pickle in it, or of what that asks for
        message = str(error).strip().partition("\n")[0]
        raise SecateurError(f"{where}: cannot be read as tensors and plain values ({message:.200})") from error
