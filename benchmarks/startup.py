"""How long a command takes to start: help, a wrong option, inspect and plan of a tiny model, and until a byte is moved.

    python benchmarks/startup.py

Rounds in turn, each command in a process of its own; a ratio is that to `python -c "import torch, transformers"` of the
same round, and the median of the rounds counts. What should need neither of the two is compared with `python -c pass`
in seconds. `apply`, `verify` and `prune` are ended when the first bytes of weights are written or compared. The last
rows are no command: what only the import of transformers' base class of models takes, and with the garbage collector
switched off. The model is a Qwen3-MoE so small that its headers take no time. Makes startup.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import parser_for, show, store

PASS, IMPORT = "python -c pass", 'python -c "import torch, transformers"'
MOST_ABOVE, MOST_RATIO = 0.5, 1.3  # the goals: seconds above PASS, times IMPORT
MODEL = """
import sys
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
sizes = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2, head_dim=16)
config = Qwen3MoeConfig(**sizes, num_key_value_heads=1, num_hidden_layers=2, num_experts=8, vocab_size=64)
config.num_experts_per_tok = 2
Qwen3MoeForCausalLM(config).save_pretrained(sys.argv[1])
"""
# The command that ends with the first chunk of weights that it has written or compared.
UNTIL_FIRST_BYTE = """
import os
from secateur.files import progress
progress.counted = lambda total, on_progress: lambda count: os._exit(77)
from secateur.cli import main
main()
"""
FIRST_BYTE = 77  # the status of such an end
BASE_CLASS = "from transformers import PreTrainedModel"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A process. name: in the table. words: after `python`. against: another case, by name. status: of its end."""

    name: str
    words: tuple[str, ...]
    against: str = IMPORT
    status: int = 0


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cases = prepared(work)
        rounds = [one_round(cases, work) for _ in range(arguments.rounds)]
    found = {case.name: measured(case, rounds) for case in cases}
    columns, *rows = table = table_of(found)
    show(f"Start-up: at most {MOST_ABOVE} s above pass, or {MOST_RATIO} times the import", columns, rows)
    goals = {"seconds_above_pass": MOST_ABOVE, "times_import": MOST_RATIO}
    result = {"rounds": len(rounds), "goals": goals, "cases": found, "table": table}
    print(f"stored {store('startup', result, stored=arguments.store)}")


def prepared(work: Path) -> list[Case]:
    """The cases, in the order of the table, and the folders that they need."""
    model, plan, pruned = (str(work / name) for name in ("model", "plan.json", "pruned"))
    secateur = ("-m", "secateur")
    for words in (
        ("-c", MODEL, model),
        (*secateur, "plan", model, "--keep", "0.5", "--out", plan, "--quiet"),
        (*secateur, "apply", model, plan, "--out", pruned, "--quiet"),
    ):
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    until = ("-c", UNTIL_FIRST_BYTE)
    new = str(work / "new")
    return [
        Case(name=PASS, words=("-c", "pass"), against=PASS),
        Case(name=IMPORT, words=("-c", "import torch, transformers")),
        Case(name="secateur --help", words=(*secateur, "--help"), against=PASS),
        Case(name="secateur --version", words=(*secateur, "--version"), against=PASS),
        Case(name="secateur plan --wrong", words=(*secateur, "plan", "--wrong"), against=PASS, status=2),
        Case(name="import secateur", words=("-c", "import secateur"), against=PASS),
        Case(name="inspect, no model there", words=(*secateur, "inspect", str(work)), against=PASS, status=2),
        Case(name="inspect", words=(*secateur, "inspect", model)),
        Case(name="plan", words=(*secateur, "plan", model, "--keep", "0.5", "--dry-run")),
        Case(name="apply, first byte", words=(*until, "apply", model, plan, "--out", new), status=FIRST_BYTE),
        Case(name="verify, first byte", words=(*until, "verify", model, pruned), status=FIRST_BYTE),
        Case(
            name="prune, first byte",
            words=(*until, "prune", model, "--criterion", "aimer", "--keep", "0.5", "--restart", "--out", new),
            status=FIRST_BYTE,
        ),
        Case(name=f'python -c "{BASE_CLASS}"', words=("-c", BASE_CLASS)),
        Case(name="the same, no collector", words=("-c", f"import gc; gc.disable(); {BASE_CLASS}; gc.freeze()")),
    ]


def one_round(cases: list[Case], work: Path) -> dict[str, tuple[float, float]]:
    """{case: (seconds, seconds of processor time)}."""
    return {case.name: timed(case, work) for case in cases}


def timed(case: Case, work: Path) -> tuple[float, float]:
    with (work / "said").open("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *case.words], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != case.status:
            said.seek(0)
            sys.exit(f"{case.name} ended with status {process.returncode}, expected {case.status}: {said.read()}")
    return seconds, usage.ru_utime + usage.ru_stime


def measured(case: Case, rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios and differences are those of one round."""
    own = [one[case.name] for one in rounds]
    against = [one[case.against] for one in rounds]
    pairs = list(zip(own, against, strict=True))
    above = statistics.median(mine[0] - other[0] for mine, other in pairs)
    ratio = statistics.median(mine[0] / other[0] for mine, other in pairs)
    return {
        "against": case.against,
        "seconds": round(statistics.median(seconds for seconds, _ in own), 3),
        "processor_seconds": round(statistics.median(seconds for _, seconds in own), 3),
        "seconds_above": round(above, 3),
        "ratio": round(ratio, 3),
        "processor_ratio": round(statistics.median(mine[1] / other[1] for mine, other in pairs), 3),
        "in_goal": above <= MOST_ABOVE if case.against == PASS else ratio <= MOST_RATIO,
    }


def table_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The columns, then a row for each case."""
    rows = [
        [
            name,
            f"{one['seconds']:.2f}",
            f"{one['processor_seconds']:.2f}",
            f"{one['seconds_above']:.2f}" if one["against"] == PASS else "",
            f"{one['ratio']:.2f}" if one["against"] == IMPORT else "",
            f"{one['processor_ratio']:.2f}" if one["against"] == IMPORT else "",
        ]
        for name, one in found.items()
    ]
    columns = ["process", "s", "processor s", "s above pass", "times import", "processor time"]
    return [columns, *rows]


if __name__ == "__main__":
    main()
