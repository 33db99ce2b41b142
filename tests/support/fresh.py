"""Programs in processes that have imported neither transformers nor Secateur, at a third of the time of a new Python.

The first call starts a Python that imports what transformers itself needs most of its time for, torch above all; each
program is a fork of it. In which order it imports transformers, its models and Secateur is its own; sets of texts have
another order than in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import secateur

HASH_SEED = "7"
SERVER = """
import gc, json, os, sys, traceback
import scipy.optimize, sympy, torch, torch._dynamo, torch.distributed.tensor
known = {name.partition(".")[0] for name in sys.modules}
assert not known & {"transformers", "huggingface_hub", "secateur"}, known
torch.set_num_threads(1)
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
            os.dup2(os.open(path, os.O_RDWR), number)
        os.environ.update(asked["environment"])
        sys.argv, status = ["-c", *asked["words"]], 0
        try:
            exec(compile(asked["code"], "<program>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def in_fresh(code: str, *words: object, environment: Mapping[str, str] | None = None) -> str:
    """What a program prints on standard output that finds `words` in sys.argv; it must end well."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        for path in (out, err):
            path.touch()
        asked = {"code": code, "words": list(map(str, words)), "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(asked | {"environment": dict(environment or {})}) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        assert status == "0", f"{status}: {err.read_text()[-3000:]}"
        return out.read_text()


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, which closes its standard input."""
    path = os.pathsep.join([str(Path(secateur.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": HASH_SEED},
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        assert server.stdin is not None
        server.stdin.close()
    server.wait()
