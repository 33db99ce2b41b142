"""The `secateur` command: its parts are in `secateur.commands`."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated

import typer

from secateur.commands.apply import apply
from secateur.commands.convert_vmoe import convert_vmoe
from secateur.commands.eval import eval
from secateur.commands.exits import fail, fail_refused, fail_without_the_others
from secateur.commands.finetune import finetune
from secateur.commands.inspect import inspect
from secateur.commands.interrupts import interruptible, interruption_in, leave_interrupted
from secateur.commands.observe import observe
from secateur.commands.phases import phases
from secateur.commands.place import place
from secateur.commands.plan import plan
from secateur.commands.pretrain import pretrain
from secateur.commands.prune import prune
from secateur.commands.report import report
from secateur.commands.streams import all_signs_printable, check_words
from secateur.commands.upcycle import upcycle
from secateur.commands.verify import verify
from secateur.errors import SecateurError

COMMANDS = (
    pretrain, phases, place, report, inspect, observe, plan, apply, verify, prune, eval, finetune, upcycle, convert_vmoe
)  # fmt: skip

app = typer.Typer(
    name="secateur",
    help="Prune the experts of Mixture-of-Experts models: while they pre-train, and as checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from secateur.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line.

    Bad input ends with one message and status 2, a refused write with status 1, an interruption with 130 or 143.
    """
    all_signs_printable()
    atexit.register(gc.freeze)  # at the end nobody looks for garbage in all that torch and transformers have loaded
    with interruptible():
        try:
            _run()
        except BaseException as error:
            if interruption := interruption_in(error):
                leave_interrupted(interruption)
            raise


def _print_the_rest() -> None:
    """A full disk or a reader that has left shows here, not when nobody looks any more."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest has nowhere to go
        raise type(error)(error.errno, error.strerror, "standard output") from error


def _run() -> None:
    try:
        try:
            check_words(sys.argv[1:])
            app(prog_name="secateur")
        finally:
            _print_the_rest()
    except (SecateurError, OSError, RuntimeError) as error:
        if interruption_in(error):
            raise
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from secateur.train.distributed.launch import has_lost_contact

            if has_lost_contact(error):
                fail_without_the_others()
        if isinstance(error, OSError):
            fail_refused(error)
        if isinstance(error, SecateurError):
            fail(str(error), 2)
        raise
