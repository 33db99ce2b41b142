"""The one error that bad input raises."""

from __future__ import annotations


class SecateurError(ValueError):
    """Something given to Secateur cannot be used.

    The message names the thing, what was found and what was expected. The command line prints it without a
    traceback and exits with status 2.
    """
