"""`python -m secateur` is the `secateur` command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from secateur.commands.interrupts import SIGNALS, interruptible, leave_interrupted


def main() -> NoReturn:
    """Run the command line and end the process, at once where it was interrupted: threads may still be at work."""
    status: object = 0
    try:
        try:
            with interruptible(to_the_end=True):
                from secateur.cli import main as run  # here: an interruption may come while it is imported

                run()
        except KeyboardInterrupt as error:  # also of a signal that came when all was done, before it was ignored
            leave_interrupted(error)
    except SystemExit as leaving:
        status = leaving.code
    if status in [128 + number for number in SIGNALS]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
