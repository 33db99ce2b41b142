"""How a command ends when it cannot do what was asked."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from secateur.errors import as_line

# Seconds a rank other than 0 waits before it speaks. Where all ranks fail alike, torchrun has ended it by then.
GRACE = 5.0
# Seconds after which torchrun has surely seen which rank ended first, and blames that one.
SEEN = 1.0


def fail(message: str, status: int) -> NoReturn:
    """Print one line on standard error and leave with this exit status; a job of several processes prints one line."""
    message = as_line(message)  # also where other packages write several lines
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE)
        message = f"rank {rank}: {message}"
    line = Text.assemble(("error:", "bold red"), " ", message)
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    sys.exit(status)


def fail_refused(error: OSError) -> NoReturn:
    """The end where the disk refused: which file, what the system says, and of a full one what is safe, what to do."""
    from secateur.files.refused import FULL, refusal_in_words

    message = refusal_in_words(error)
    if error.errno in FULL:
        how = " and ".join(getattr(error, "__notes__", ("run the same command again",)))
        message += f"; nothing half-written has the name of a result; make room and {how}"
    fail(message, 1)


def fail_without_the_others() -> NoReturn:
    """The end of a rank whose job has lost another one: rank 0 says so, in one line that leaves the cause to others."""
    message = "lost contact with another rank; its own message or torchrun's summary says why; go on with --resume"
    if os.environ.get("RANK") == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to end all ranks
        message = f"rank 0: {message}"
        time.sleep(SEEN)
    fail(message, 1)
