"""Jobs of several processes in a second or two: ranks forked from one process that has imported everything.

Each has the environment that torchrun gives it, and like torchrun's, a job whose rank fails is ended as a whole.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fork_server import context
from support.small_runs import light_report

PATIENCE = 900.0  # a job that hangs; on a busy machine one that does not takes minutes
TERM_TO_KILL = 10.0


@dataclass(frozen=True)
class Ended:
    """How a job ended: the exit status of every rank (-9 for SIGKILL), and what all ranks wrote on standard error."""

    statuses: tuple[int, ...]
    said: str

    @property
    def is_good(self) -> bool:
        return not any(self.statuses)


def job(num_ranks: int, target: Callable[..., Any], *values: Any, folder: Path) -> Ended:
    """Run `target(*values)` on every rank; `folder` takes what they say."""
    server = context()
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / f"said-{port}"
    said.touch()
    ranks = []
    for rank in range(num_ranks):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        words = {name: str(value) for name, value in environment.items()}
        process = server.Process(target=_rank, args=(words, said, target, values))
        process.start()
        ranks.append(process)
    deadline = time.monotonic() + PATIENCE
    while any(one.is_alive() for one in ranks) and not any(one.exitcode for one in ranks):
        if time.monotonic() > deadline:
            for one in ranks:
                one.kill()
            raise AssertionError(f"the job hangs: {said.read_text()}")
        time.sleep(0.02)
    if any(one.exitcode for one in ranks):
        time.sleep(0.1)  # torchrun looks every 0.1 s
        for one in ranks:
            if one.is_alive():
                one.terminate()
        for one in ranks:
            one.join(TERM_TO_KILL)
            one.kill()
    for one in ranks:
        one.join()
    return Ended(tuple(one.exitcode or 0 for one in ranks), said.read_text())


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def _rank(environment: dict[str, str], said: Path, target: Callable[..., Any], values: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the rest of the process
    target(*values)


def command(words: list[str], *hooks: Callable[[], None]) -> None:
    """`secateur WORDS` with a light report, after the hooks."""
    from secateur import cli
    from secateur.pretraining import run as program

    program.write_report = light_report
    for hook in hooks:
        hook()
    sys.argv = ["secateur", *words]
    cli.main()
