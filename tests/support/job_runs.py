"""Runs of a second or two on several processes, finished or shot, that the tests of a session share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.faults import Kill
from support.small_jobs import Ended, command, job
from support.small_runs import arguments, corpus_in, options

# Small steps: near a tie, float32 sends a token to another expert when a sum is made in another order, and large steps
# blow that up. 16 experts and multiples of 4, so that every expert-parallel size up to 4 keeps the same ones.
STEADY: dict[str, Any] = {
    "overrides": {"num_experts": 16},
    "learning_rate": 1e-3,
    "schedule": "constant_with_warmup",
    "multiple_of": 4,
    "target_params": 0.7,
    "prune_at_step": 6,  # between two checkpoints, and after the first rearrangement of those that have some
    "steps": 12,  # until a rearrangement, a validation and a checkpoint of the pruned model
    "log_steps": 2,
    "eval_steps": 10,
    "save_steps": 4,
}
# kind of run -> its settings
KINDS: dict[str, dict[str, Any]] = {
    "over 2": STEADY | {"rearrange_ranks": 2, "rearrange_every": 5, "window_steps": 5},
    "two heads": STEADY | {"overrides": {"num_experts": 16, "num_key_value_heads": 2}, "rearrange_ranks": 2},
    "kept in order": STEADY | {"no_rearrange": True},
    "odd counts": STEADY | {"no_rearrange": True, "multiple_of": 1},
    # a balance loss is of the tokens that a forward pass sees: two ranks are two micro-batches
    "loss": STEADY | {"balance": "mixtral", "no_rearrange": True},
    "loss of two": STEADY | {"balance": "mixtral", "no_rearrange": True, "accumulation": 2, "batch_size": 2},
    "bias, accumulated": STEADY
    | {"preset": "deepseek_v3", "overrides": {"n_routed_experts": 16}, "balance": "bias", "no_rearrange": True}
    | {"accumulation": 2},
}
STEP_END = "secateur.train.callback:LAEPCallback.on_step_end"


class Runs:
    """Begins runs, and makes those that are asked for again only once a session."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._corpus = corpus_in(factory)
        self._factory = factory
        self._folder = factory.getbasetemp() / "job-runs"
        self._folder.mkdir(exist_ok=True)

    def start(self, out: Path, ranks: int, *hooks: Callable[[], None], kind: str | None = None, **split: int) -> Ended:
        """Begin a run of a kind on `ranks` processes, or without a kind go on with the one in `out`."""
        return self.job(ranks, self.words(out, kind, **split), *hooks)

    def job(self, ranks: int, words: list[str], *hooks: Callable[[], None]) -> Ended:
        return job(ranks, command, words, *hooks, folder=self._folder)

    def words(self, out: Path, kind: str | None = None, **split: int) -> list[str]:
        """The command line of such a run."""
        words = ["pretrain", "--out", str(out), "--quiet"]
        words += ["--resume"] if kind is None else arguments(options(self._corpus, **KINDS[kind]))
        return words + [word for name, size in split.items() for word in (f"--{name}", str(size))]

    def finished(self, kind: str, ranks: int = 1, **split: int) -> Path:
        """The folder of a run that nobody stopped. Its checkpoints are still there."""
        out = self._folder / f"{kind}-{ranks}-{split}"
        if not (out / "report.json").exists():
            assert self.start(out, ranks, keep_checkpoints, kind=kind, **split) == Ended((0,) * ranks, "")
        return out

    def killed(self, kind: str, ranks: int, step: int, **split: int) -> Path:
        """A copy of a run that was shot after `step`; checkpoints at every fourth, pruning at the sixth."""
        out = self._folder / f"{kind}-{ranks}-{split}-until-{step}"
        if not out.exists():
            ended = self.start(out, ranks, Kill(STEP_END, step), kind=kind, **split)
            assert -signal.SIGKILL in ended.statuses
            assert not (out / "summary.json").exists()
        return self._copy(out)

    def cut_back(self, kind: str, ranks: int = 1, **split: int) -> Path:
        """A copy of a finished run as a kill in the last step leaves it: the last checkpoint is the eighth step's."""
        out = self._copy(self.finished(kind, ranks, **split))
        for name in ("summary.json", "plan.json", "report.json"):
            (out / name).unlink()
        for name in ("model", "checkpoints/checkpoint-12"):
            shutil.rmtree(out / name)
        return out

    def _copy(self, out: Path) -> Path:
        return Path(shutil.copytree(out, self._factory.mktemp("copied") / "run"))


def keep_checkpoints() -> None:
    from secateur.pretraining import run as program

    rmtree = program.shutil.rmtree

    class Shutil:
        copyfile = staticmethod(shutil.copyfile)

        @staticmethod
        def rmtree(path: Path, **kwargs: Any) -> None:
            if path.name != "checkpoints":
                rmtree(path, **kwargs)

    program.shutil = Shutil  # type: ignore[assignment]
