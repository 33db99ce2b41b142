"""The evidence for LAEP: the tables of its paper (arXiv 2601.14327) at small scale, and what the paper leaves open.

    python benchmarks/fetch_text.py TEXT && python benchmarks/laep_tables.py TEXT --work WORK

Trains every setting of laep_grid.py once for each seed, `--jobs` at a time, each with `secateur pretrain` in a process
of its own. A finished run is a folder of a few files in WORK and is not repeated, so the command may be stopped and
started again at any time; a run that fails is a row that says so. `--gather` only reads what is there. Its
result is laep_tables_SCALE.json; laep_evidence.py makes pages of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from laep_grid import SCALES, Setting, grid
from record import parser_for, show, store
from secateur.pretraining.run_folder import RunFolder

STEP_TIMES = "step_times.json"  # what laep_timing.py leaves in WORK/SCALE
DOMAINS = ("manuals", "dictionary", "speeches")
KEPT = ("run.json", "metrics.jsonl", "loads.jsonl", "events.json", "plan.json", "report.json", "summary.json")
SCRIPT = Path(__file__).with_name("laep_random.py")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--groups", nargs="+", help="only these: table-1, table-2, when, automatic, scaling")
    parser.add_argument("--gather", action="store_true", help="train nothing, store what is there")
    arguments = parser.parse_args()
    wanted = [name.replace("-", " ") for name in arguments.groups or ()]
    settings = [one for one in grid(SCALES[arguments.scale]) if not wanted or one.group in wanted]
    work = Runs(arguments.work, arguments.text, arguments.scale)
    if not arguments.gather:
        work.prepare()
        for seed in range(arguments.seeds):
            for wave in (0, 1):  # those that need another run's step come after all others
                jobs = [one for one in settings if (one.after is not None) == wave]
                with ThreadPoolExecutor(arguments.jobs) as pool:
                    list(pool.map(lambda one, seed=seed: work.train(one, seed), jobs))
    runs = [found for one in settings for seed in range(arguments.seeds) if (found := work.read(one, seed))]
    rows = [[one["group"], one["name"], str(one["seed"]), one["status"], _loss(one)] for one in runs]
    show(f"{len(runs)} runs", ["group", "run", "seed", "status", "validation loss"], rows)
    sources = json.loads((arguments.text / "sources.json").read_text())
    times = work.work / STEP_TIMES
    record = {
        "scale": arguments.scale,
        "sources": sources,
        "runs": runs,
        "step_times": json.loads(times.read_text()) if times.exists() else {},
    }
    print(store(f"laep_tables_{arguments.scale}", record, stored=arguments.store))


def _loss(one: dict[str, Any]) -> str:
    return "-" if one.get("validation_loss") is None else f"{one['validation_loss']:.4f}"


class Runs:
    """The folder of all runs: one folder a setting and seed."""

    def __init__(self, work: Path, text: Path, scale: str) -> None:
        self.work, self.text, self.scale = work / scale, text, SCALES[scale]

    def prepare(self) -> None:
        """Text of all domains in one form, and the tokenizer that all runs share."""
        from laep_quality import write_code

        self.work.mkdir(parents=True, exist_ok=True)
        write_code(self.text)
        if not (self.work / "tokenizer").is_dir():
            beside = self.work / ".first"
            shutil.rmtree(beside, ignore_errors=True)
            more = ["--steps", "1", "--no-prune", "--log-steps", "1", "--eval-steps", "1", "--save-steps", "1"]
            self._call([*self._arguments(0, 1), *more, "--out", str(beside)], random=False)
            (self.work / "tokenizer").mkdir()
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(beside / "model" / name, self.work / "tokenizer" / name)
            shutil.rmtree(beside)

    def folder(self, one: Setting, seed: int) -> Path:
        return self.work / one.folder(seed)

    def train(self, one: Setting, seed: int) -> None:
        """Train, unless it was; what a stopped start or another setting of this name left is thrown away.

        Raises:
            SecateurError: another process is training it.
        """
        out = self.folder(one, seed)
        if self.outcome(one, seed) is not None:
            return
        if out.is_dir():
            with RunFolder(out).locked():
                shutil.rmtree(out)
        try:
            times = self._times(one, seed)
        except LookupError as error:
            self._finish(out, {"status": f"not run: {error}", "setting": one.told()})
            return
        fields = [word for name, value in one.model for word in ("--set", f"{name}={value}")]
        tokenizer = ["--tokenizer", str(self.work / "tokenizer"), "--preset", one.preset, *fields]
        curve = 200 if one.group == "when" else one.steps  # only there losses between are looked at
        rarely = ["--log-steps", "10", "--eval-steps", str(curve), "--save-steps", str(one.steps)]
        arguments = [*self._arguments(seed, one.steps), *tokenizer, *rarely, *times, "--out", str(out)]
        began = time.perf_counter()
        try:
            error = self._call(arguments, random=one.random)
        except InterruptedError:
            return  # the next start trains it again
        seconds = time.perf_counter() - began
        status = "finished" if error is None else f"failed: {error}"
        self._finish(out, {"status": status, "setting": one.told(), "seconds": seconds, "options": times})
        print(f"{one.name}, seed {seed}: {status}, {seconds:.0f} s", flush=True)

    def outcome(self, one: Setting, seed: int) -> dict[str, Any] | None:
        """How its run ended; None where it was not made, or with other settings."""
        path = self.folder(one, seed) / "outcome.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found if found is not None and found.get("setting") == one.told() else None

    def read(self, one: Setting, seed: int) -> dict[str, Any] | None:
        """What one run is in the results; None while it has not been run."""
        outcome, out = self.outcome(one, seed), self.folder(one, seed)
        if outcome is None:
            return None
        about = {"group": one.group, "name": one.name, "base": one.base, "seed": seed, "preset": one.preset}
        about |= {"model": dict(one.model), "steps": one.steps, **outcome}
        if about["status"] != "finished":
            return about
        summary, events = (json.loads((out / name).read_text()) for name in ("summary.json", "events.json"))
        run = json.loads((out / "run.json").read_text())
        model = run["model"]
        return about | {
            "validation_loss": summary["validation_loss"],
            "by_domain": summary["validation_loss_by_domain"],
            "tokens": summary["tokens"],
            "parameters_before": model["parameters"],
            "parameters": summary["parameters"],
            "experts_before": model["experts"],
            "events": [_event(event) for event in events],
            "evaluations": _evaluations(out),
            "versions": run["versions"],
            "hardware": run["hardware"],
        }

    def _arguments(self, seed: int, steps: int) -> list[str]:
        data = [f"code={self.text / 'code.jsonl'}", *(f"{name}={self.text / name}.jsonl" for name in DOMAINS)]
        asked = [word for one in data for word in ("--data", one)]
        return ["pretrain", *asked, "--seed", str(seed), "--steps", str(steps), *self.scale.options, "--quiet"]

    def _times(self, one: Setting, seed: int) -> list[str]:
        """The options of a setting, its times counted from the pruning of the run it follows."""
        if one.after is None:
            return list(one.options)
        earlier = next(other for other in grid(self.scale) if other.name == one.after)
        path = self.folder(earlier, seed) / "events.json"
        events = json.loads(path.read_text()) if path.exists() else []
        if not events:
            raise LookupError(f"{one.after!r} never pruned")
        return [resolved(word, events[0], one.steps) for word in one.options]

    def _call(self, arguments: Sequence[str], *, random: bool) -> str | None:
        """Run it; the last line of its error, or None.

        Raises:
            InterruptedError: somebody ended it.
        """
        program = [str(SCRIPT)] if random else ["-m", "secateur"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([sys.executable, *program, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode < 0 or done.returncode == 130:
            raise InterruptedError(f"ended with {done.returncode}")
        return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:300]

    def _finish(self, out: Path, outcome: dict[str, Any]) -> None:
        """Leave the small files, and last the one that says it is over."""
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / "outcome.json").write_text(json.dumps(outcome) + "\n")


def resolved(word: str, event: dict[str, Any], steps: int) -> str:
    """An option with the places filled in that `Setting.after` is about.

    Raises:
        LookupError: a step that is not before the end of the run.
    """

    def step(found: re.Match[str]) -> str:
        number = round(float(found[1]) * event["step"]) + int(found[2] or 0)
        if number >= steps:
            raise LookupError(f"step {number} of {steps} is not before the end")
        return str(number)

    word = re.sub(r"\{([0-9.]+)\+?([0-9]*)\}", step, word)
    return re.sub(r"\{part (\d+) of (\d+)\}", lambda found: _share(event, int(found[1]), int(found[2])), word)


def _share(event: dict[str, Any], part: int, parts: int) -> str:
    """What a part leaves of the parameters it finds; rounded up, so that not one expert more goes."""
    gone = sum(layer["experts_before"] - layer["experts_after"] for layer in event["layers"].values())
    of_one = (event["parameters_before"] - event["parameters_after"]) / gone
    before, after = (event["parameters_before"] - math.ceil(gone * k / parts) * of_one for k in (part, part + 1))
    return f"{math.ceil(1e6 * after / before) / 1e6:.6f}"


def _event(event: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "reason", "rerouted_share", "parameters_before", "parameters_after")
    kept = {layer: one["experts_after"] for layer, one in event["layers"].items()}
    return {name: event[name] for name in names} | {"kept": kept}


def _evaluations(out: Path) -> list[list[float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [[one["step"], one["seconds"], one["validation_loss"]] for one in lines if one["kind"] == "eval"]


if __name__ == "__main__":
    main()
