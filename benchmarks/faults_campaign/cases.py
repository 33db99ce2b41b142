"""The commands that write, each as one case: its command line, what it reads, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from faults_campaign.inputs import PRETRAIN

TEXT = "--data code=code.jsonl --data prose=prose.jsonl"
SAMPLES = f"{TEXT} --samples 12 --sequence-length 16 --batch-size 4"
TRAINING = "--log-steps 1 --save-steps 2 --learning-rate 0.01 --warmup 0 --out out --quiet"
PRETRAINED = (
    "out/model",
    "out/control/model",
    "out/plan.json",
    "out/summary.json",
    "out/report.json",
    "out/report.html",
)
REPORT = ("run/report.json", "run/report.html")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, in a work folder with these inputs.

    Args:
        results: names that are whole or not there, whatever happens; a folder is whole with all that is in it.
        late: names in a result that may come after the others.
        phases: (name, pattern): a phase begins with the first file event that the pattern is found in.
        resume: what to give in place of `words` where the command says that --resume goes on.
        replaces: names of inputs that the command writes anew.
    """

    name: str
    words: str
    inputs: str
    results: tuple[str, ...]
    late: tuple[str, ...] = ()
    phases: tuple[tuple[str, str], ...] = (("write", ""),)
    resume: str | None = None
    replaces: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return self.words.split()[0]


def _finetune(name: str, words: str, inputs: str) -> Case:
    return Case(
        name=name,
        words=f"finetune {words} {TRAINING}",
        inputs=inputs,
        results=("out",),
        phases=(("train", ""), ("save", r"\.partial"), ("finish", r"\.partial -> out")),
        resume=f"finetune {words} {TRAINING} --resume",
    )


CASES: tuple[Case, ...] = (
    Case(
        name="observe",
        words=f"observe source {SAMPLES} --activations disk --out new.safetensors --quiet",
        inputs="source code.jsonl prose.jsonl",
        results=("new.safetensors",),
        phases=(("begin", ""), ("layers", "states/00001"), ("finish", r"^\.new\.safetensors\.\w{16}")),
    ),
    Case(
        name="observe images",
        words="observe classifier --data images.npz --samples 24 --batch-size 8 --out new.safetensors --quiet",
        inputs="classifier images.npz",
        results=("new.safetensors",),
    ),
    Case(
        name="observe --sglang",
        words="observe base --sglang counts.pt --out new.safetensors --quiet",
        inputs="base counts.pt",
        results=("new.safetensors",),
    ),
    Case(
        name="plan",
        words="plan stats.safetensors --keep 0.5 --out new.json --quiet",
        inputs="stats.safetensors",
        results=("new.json",),
    ),
    Case(
        name="plan, of weights",
        words="plan source --criterion aimer --keep 0.5 --out new.json --quiet",
        inputs="source",
        results=("new.json",),
    ),
    Case(
        name="apply --undo",
        words="apply source plan.json --out out --undo side --quiet",
        inputs="source plan.json",
        results=("out", "side"),
        phases=(("result", ""), ("undo", r"side.*dropped-00001"), ("finish", r"\.partial -> side")),
    ),
    Case(
        name="apply, restore",
        words="apply pruned undo --out out --quiet",
        inputs="pruned undo",
        results=("out",),
        phases=(("weights", ""), ("files", r"config\.json"), ("finish", r"\.partial -> out")),
    ),
    Case(
        name="apply, training checkpoint",
        words="apply training training-plan.json --out out --quiet",
        inputs="training training-plan.json",
        results=("out",),
        phases=(("write", ""), ("finish", r"plan\.json")),
    ),
    Case(
        name="apply, distributed save",
        words="apply shards training-plan.json --out out --quiet",
        inputs="shards training-plan.json",
        results=("out",),
        phases=(("write", ""), ("finish", r"plan\.json")),
    ),
    Case(
        name="prune",
        words=f"prune source {SAMPLES} --keep 0.5 --out out --undo side --activations disk --quiet",
        inputs="source code.jsonl prose.jsonl",
        results=("out", "side"),
        phases=(
            ("observe", ""),
            ("plan", r"pruning/\.plan\.json"),
            ("apply", r"\.partial"),
            ("verify", r"\.partial/observed"),
            ("finish", r"\.partial -> side"),
        ),
    ),
    _finetune(
        "finetune", f"source {TEXT} --sequence-length 16 --steps 6 --batch-size 4", "source code.jsonl prose.jsonl"
    ),
    _finetune("finetune, images", "classifier --data images.npz --steps 4 --batch-size 8", "classifier images.npz"),
    Case(
        name="pretrain",
        words=f"pretrain --out out --control {PRETRAIN}",
        inputs="corpus",
        results=PRETRAINED,
        late=("out/model/report.json", "out/model/plan.json"),
        phases=(
            ("data", ""),
            ("train", r"out/checkpoints"),
            ("save", r"out/\.model"),
            ("control", r"out/control"),
            ("report", r"out/figures"),
        ),
        resume="pretrain --out out --resume --quiet",
    ),
    Case(
        name="place",
        words="place loads.json --ranks 2 --out new.json --plan new-plan.json --sglang new-sglang.json --quiet",
        inputs="loads.json",
        results=("new.json", "new-plan.json", "new-sglang.json"),
    ),
    Case(name="report", words="report run", inputs="run", results=REPORT, replaces=("run",)),
    Case(
        name="convert-vmoe",
        words="convert-vmoe published/vmoe --top-k 2 --out out --quiet",
        inputs="published",
        results=("out",),
    ),
)
BY_NAME = {case.name: case for case in CASES}
