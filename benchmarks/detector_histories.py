"""The recorded load histories, packed into one file of integers that tests and benchmarks read.

Legend: W windows, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector_grid import SEEDS, SETTINGS, Setting

STORED = Path(__file__).parent / "results"
PATTERN = "detector_histories_seed*.npz"
MOST = 150  # windows that are stored of a run; more are joined
FINAL = 0.1  # of the run, at its end: the loads that a choice is judged by
IDLE = 4  # one in four experts

# name -> type: steps (W,) at the windows' ends, loads (W, L, E), learning_rate (W,) after the last step, loss (W,),
# gradient (W, L, E) in 1/65535 of the layer's, margin (W, L)
ARRAYS: dict[str, Any] = {
    "steps": np.int32,
    "loads": np.int32,
    "learning_rate": np.float32,
    "loss": np.float32,
    "gradient": np.uint16,
    "margin": np.float32,
}
MEANS = ("loss", "gradient", "margin")  # of joined windows; loads are summed, of the others the last one counts
KEPT = ("steps", "loads", "learning_rate", "loss")  # of every seed; the rest of the first alone, as it takes much room

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """One run. gradient, margin: None where they are not kept."""

    setting: Setting
    seed: int
    steps: NDArray[np.int64]
    loads: NDArray[np.int64]
    learning_rate: Floats
    loss: Floats
    gradient: Floats | None
    margin: Floats | None

    @property
    def name(self) -> str:
        return f"{self.setting.name}-seed{self.seed}"

    @property
    def num_windows(self) -> int:
        return len(self.loads)

    def step(self, window: int) -> int:
        """At the end of the window, which is counted from 1."""
        return int(self.steps[window - 1])

    def tokens(self, window: int) -> int:
        """Until the end of the window."""
        return self.step(window) * self.setting.tokens

    @cached_property
    def sums(self) -> NDArray[np.int64]:
        """(W + 1, L, E) loads of all windows before."""
        return np.concatenate([np.zeros_like(self.loads[:1]), self.loads.cumsum(0)])

    def between(self, first: int, last: int) -> Floats:
        """(L, E) shares of the tokens in the windows after `first` up to `last`."""
        loads = self.sums[last] - self.sums[first]
        shares: Floats = loads / loads.sum(1, keepdims=True)
        return shares

    @cached_property
    def final(self) -> Floats:
        """(L, E) shares at the end."""
        return self.between(self.num_windows - max(1, round(FINAL * self.num_windows)), self.num_windows)

    def regret(self, chosen_by: Floats) -> float:
        """At the end, of the quarter that is idlest by `chosen_by` (L, E), in points of the tokens."""
        return 100 * regret(chosen_by, self.final)


def regret(chosen_by: Floats, now: Floats) -> float:
    """What the idlest quarter by `chosen_by` (L, E) carries of `now`, over what the idlest does; mean over layers."""
    return float((carried(chosen_by, now) - carried(now, now)).mean())


def carried(chosen_by: Floats, now: Floats) -> Floats:
    """(L,) the share of `now` that the idlest quarter by `chosen_by` carries; of equal ones the higher ids go."""
    size = max(1, chosen_by.shape[1] // IDLE)
    order = chosen_by.shape[1] - 1 - np.argsort(chosen_by[:, ::-1], axis=1, kind="stable")
    return np.asarray(np.take_along_axis(now, order[:, :size], axis=1).sum(1))


def load_histories(folder: Path = STORED) -> list[History]:
    """Those of the packed files, in the order of the grid."""
    return _histories(_arrays(sorted(folder.glob(PATTERN))))


def load_recorded(work: Path) -> list[History]:
    """Those that detector_record.py has finished, with long runs joined to MOST windows."""
    arrays: dict[str, Any] = {}
    for path in sorted(work.glob("*-seed*.npz")):
        with np.load(path, allow_pickle=False) as file:
            arrays |= {f"{path.stem}/{name}": value for name, value in joined(dict(file)).items()}
    return _histories(arrays)


def joined(arrays: dict[str, Any]) -> dict[str, Any]:
    """Windows in groups of equal length, so that there are at most MOST; a short group at the end is left out."""
    size = -(-len(arrays["loads"]) // MOST)
    whole = len(arrays["loads"]) // size * size
    found = {}
    for name, value in arrays.items():
        groups = value[:whole].reshape(-1, size, *value.shape[1:])
        found[name] = groups.sum(1) if name == "loads" else groups.mean(1) if name in MEANS else groups[:, -1]
    return found


def pack(histories: list[History], folder: Path) -> None:
    """Write one file a seed."""
    for seed in sorted({one.seed for one in histories}):
        arrays: dict[str, Any] = {}
        for one in histories:
            if one.seed == seed:
                for name in ARRAYS if seed == 0 else KEPT:
                    value = getattr(one, name)
                    arrays[f"{one.name}/{name}"] = value.astype(ARRAYS[name])
        np.savez_compressed(folder / PATTERN.replace("*", str(seed)), **arrays)


def names_stored(folder: Path = STORED) -> set[str]:
    """The runs that the packed files have."""
    return {key.rsplit("/", 1)[0] for key in _arrays(sorted(folder.glob(PATTERN)))}


def _arrays(paths: list[Path]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            arrays |= dict(file)
    return arrays


def _histories(arrays: dict[str, Any]) -> list[History]:
    names = {key.rsplit("/", 1)[0] for key in arrays}
    found = []
    for seed in range(SEEDS):
        for setting in SETTINGS:
            name = f"{setting.name}-seed{seed}"
            if name not in names:
                continue
            kept = {key: arrays.get(f"{name}/{key}") for key in ARRAYS}
            floats = {key: None if value is None else value.astype(np.float64) for key, value in kept.items()}
            whole = {key: kept[key].astype(np.int64) for key in ("steps", "loads")}  # type: ignore[union-attr]
            found.append(History(setting=setting, seed=seed, **(floats | whole)))
    return found
