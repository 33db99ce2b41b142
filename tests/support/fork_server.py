"""The process that the children of the tests are forked from: it has imported everything, and run nothing."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

TESTS = str(Path(__file__).parents[1])
PATH = "PYTHONPATH"


def context() -> BaseContext:
    """Start the server if there is none; it finds its modules by PYTHONPATH alone."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["support.warm"])
    before = os.environ.get(PATH)
    os.environ[PATH] = os.pathsep.join([TESTS, *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[PATH]
        else:
            os.environ[PATH] = before
    return found
