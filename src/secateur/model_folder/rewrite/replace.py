"""May `--force` replace what is under the name of a result?"""

from __future__ import annotations

from pathlib import Path

import msgspec

from secateur.errors import SecateurError
from secateur.files.json import read_object
from secateur.files.new_folder import check_apart, check_target, is_occupied
from secateur.files.records import as_record
from secateur.model_folder.rewrite.report import REPORT, read_applied
from secateur.model_folder.rewrite.side_files import MADE_ANEW, PLAN
from secateur.plans import is_side_file

WEIGHTS = (".safetensors", ".safetensors.index.json")


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of an earlier report.json: files that were copied, and those that were rewritten."""

    files_copied: tuple[str, ...]
    configs_edited: tuple[str, ...]


def check_out(source: Path, out: Path, *, force: bool) -> bool:
    """Refuse a target that is not free; with `force` an earlier result is replaced, and nothing else ever is.

    Returns:
        Whether there is a result to replace.

    Raises:
        SecateurError: see `check_target`; or what is there is no result of `apply` or `prune`, or holds more than one.
    """
    if not force or not is_occupied(out):
        check_target(source, out)
        return False
    check_apart(source, out)
    if out.is_symlink() or not out.is_dir():
        raise SecateurError(f"--out {out}: no folder; --force replaces only one that `apply` or `prune` wrote")
    read_applied(out / REPORT)
    listed = as_record(read_object(out / REPORT), Listed, str(out / REPORT))
    ours = {*MADE_ANEW, *listed.files_copied, *listed.configs_edited}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        is_ours = name in ours or is_side_file(name, PLAN) or ("/" not in name and name.endswith(WEIGHTS))
        if (path.is_symlink() or not path.is_dir()) and not is_ours:
            raise SecateurError(
                f"--out {out}: {name} in it is not of the result that `apply` wrote there; --force would throw it "
                "away, so move it first"
            )
    return True
