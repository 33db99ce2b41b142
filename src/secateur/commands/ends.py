"""How a command ends when it cannot do what was asked."""

from __future__ import annotations

import sys
from typing import NoReturn

from rich.console import Console
from rich.markup import escape


def fail(message: str, status: int) -> NoReturn:
    """Print one line on standard error and leave with this exit status."""
    message = " ".join(message.split())  # one line, also where other packages write several
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(status)
