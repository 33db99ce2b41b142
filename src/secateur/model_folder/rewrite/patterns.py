"""Regular expressions and globs by which a quantisation names modules: what they match, in a time that is bounded."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

from secateur.errors import SecateurError

REGEX = ("re:", "-:", "+:")  # compressed-tensors; GPTQ's `dynamic`, which leaves out or adds
GLOB = re.compile(r"[*?\[]")
MAX_STEPS = 2 * 10**7  # that one name may take, at worst
MAX_LENGTH = 2000

Matches = Callable[[str], bool]


def split_prefix(text: str) -> tuple[str, str]:
    """(what says that a regular expression follows, or "", the rest)."""
    prefix = next((one for one in REGEX if text.startswith(one)), "")
    return prefix, text.removeprefix(prefix)


def is_pattern(text: str) -> bool:
    """Whether a text is no plain name; a backslash is in no name and in no glob."""
    prefix, body = split_prefix(text)
    return bool(prefix) or "\\" in body or bool(GLOB.search(body))


def start_of(text: str) -> str:
    """With what all names begin that a glob matches; "" for a regular expression."""
    prefix, body = split_prefix(text)
    return "" if prefix or "\\" in body else GLOB.split(body, maxsplit=1)[0]


def matcher(text: str, longest: int) -> Matches:
    """What a pattern matches, as the tools read it: regular expressions from the first letter on, globs as a whole.

    Args:
        longest: letters of the longest name that it will be compared with.

    Raises:
        SecateurError: no regular expression, or one that may take too long.
    """
    prefix, body = split_prefix(text)
    if len(body) > MAX_LENGTH:
        raise SecateurError(f"a pattern of {len(body)} letters, expected at most {MAX_LENGTH}")
    if not prefix and "\\" not in body:
        glob = re.compile(fnmatch.translate(body))
        return lambda name: glob.match(name) is not None
    _check_time(body, longest)
    try:
        pattern = re.compile(body)
    except (re.error, OverflowError, RecursionError) as error:
        raise SecateurError(f"no regular expression ({error})") from error
    return lambda name: pattern.match(name) is not None


def _check_time(body: str, longest: int) -> None:
    """Refuse what Python's search may take very long for: a repeated group with repeats in it, many open repeats."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", body)  # without classes and escaped letters
    repeats, inside, depth, repeats_group = 0, False, 0, False
    for before, letter in zip(" " + plain, plain, strict=False):
        depth += (letter == "(") - (letter == ")")
        if letter in "*+{":
            repeats += 1
            repeats_group |= before == ")"
            inside |= before != ")" and depth > 0
    if (repeats_group and (inside or repeats > 1)) or longest ** max(repeats - 1, 0) > MAX_STEPS:
        raise SecateurError("a regular expression whose search may take too long")
