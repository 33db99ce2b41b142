"""Every file that a command reads, with the command that reads it: each is damaged in turn."""

from __future__ import annotations

from dataclasses import dataclass

from faults_campaign.cases import BY_NAME, SAMPLES, TEXT, TRAINING
from faults_campaign.inputs import PRETRAIN


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A folder in which a command was killed at the first file event that the pattern is found in."""

    words: str
    inputs: str
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A command that reads a file.

    Args:
        file: in the work folder. stopped: name of the folder that it goes on in, else its inputs are there.
        results: names that must not be there where it fails. is_content: another value in it is another, right input: a
            text, a weight, a number of a config; the other files say what is known from elsewhere too.
    """

    words: str
    inputs: str
    file: str
    results: tuple[str, ...] = ()
    stopped: str = ""
    is_content: bool = False

    @property
    def name(self) -> str:
        return f"{self.words.split()[0]}{' --resume' if self.stopped else ''}: {self.file}"


STOPPED = {
    "observe": Stopped(words=BY_NAME["observe"].words, inputs=BY_NAME["observe"].inputs, pattern="states/00003/"),
    "prune": Stopped(words=BY_NAME["prune"].words, inputs=BY_NAME["prune"].inputs, pattern=r"\.partial"),
    "finetune": Stopped(
        words=BY_NAME["finetune"].words, inputs=BY_NAME["finetune"].inputs, pattern="checkpoint-6/optimizer"
    ),
    "pretrain": Stopped(words=f"pretrain --out out {PRETRAIN}", inputs="corpus", pattern="checkpoint-12/trainer_state"),
}
ALL_TEXT = "source code.jsonl prose.jsonl"
OBSERVE = f"observe source {SAMPLES} --out new.safetensors --quiet"
IMAGES = "observe classifier --data {} --samples 24 --batch-size 8 --out new.safetensors --quiet"
RESTORE = "apply pruned undo --out out --quiet"


def _table() -> list[Reader]:
    found: list[Reader] = []

    def add(words: str, inputs: str, files: str, results: str = "", content: str = "", stopped: str = "") -> None:
        for file in f"{files} {content}".split():
            found.append(
                Reader(
                    words=words,
                    inputs=inputs,
                    file=file,
                    results=tuple(results.split()),
                    is_content=file in content.split(),
                    stopped=stopped,
                )
            )

    weights = "source/model-00001-of-00008.safetensors"
    add("inspect source --json", "source", "source/model.safetensors.index.json", "", f"source/config.json {weights}")
    add("plan source --criterion aimer --keep 0.5 --out new.json --quiet", "source", "", "new.json", weights)
    add("plan stats.safetensors --keep 0.5 --out new.json --quiet", "stats.safetensors", "", "new.json",
        "stats.safetensors")  # fmt: skip
    add("plan run --criterion frequency --keep 0.5 --out new.json --quiet", "run", "", "new.json", "run/loads.jsonl")
    add("plan adapter --pretrained base --keep 0.5 --out new.json --quiet", "adapter base",
        "", "new.json", "adapter/adapter_config.json adapter/adapter_model.safetensors")  # fmt: skip
    add(OBSERVE, ALL_TEXT, "", "new.safetensors",
        f"source/config.json source/tokenizer_config.json {weights} source/tokenizer.json code.jsonl")  # fmt: skip
    mine = "classifier/config.json classifier/preprocessor_config.json classifier/model.safetensors"
    add(IMAGES.format("images.npz"), "classifier images.npz", "", "new.safetensors", f"images.npz {mine}")
    add(IMAGES.format("pictures"), "classifier pictures", "", "new.safetensors", "pictures/one/0.png")
    add("observe base --sglang counts.pt --out new.safetensors --quiet", "base counts.pt", "", "new.safetensors",
        "counts.pt")  # fmt: skip
    # the undo folder keeps the index as it is, with metadata that nothing else knows
    add("apply source plan.json --out out --undo side --quiet", "source plan.json", "", "out side",
        f"source/model.safetensors.index.json plan.json source/config.json {weights}")  # fmt: skip
    add(RESTORE, "pruned undo",
        "undo/undo.json undo/headers/model-00001-of-00008.safetensors undo/files/config.json pruned/config.json "
        "undo/dropped-00001-of-00003.safetensors pruned/model-00001-of-00005.safetensors pruned/tokenizer.json",
        "out")  # fmt: skip
    add("verify source pruned --json", "source pruned",
        "pruned/plan.json pruned/report.json pruned/config.json pruned/model.safetensors.index.json "
        "pruned/model-00001-of-00005.safetensors")  # fmt: skip
    add(f"eval source {SAMPLES} --json", ALL_TEXT, "", "", "source/generation_config.json prose.jsonl")
    # .metadata is a pickle without a digest: a name or a setting in it that nothing else knows is as good as another
    add("apply training training-plan.json --out out --quiet", "training training-plan.json", "", "out",
        "training/.metadata training/__0_0.distcp")  # fmt: skip
    add("apply shards training-plan.json --out out --quiet", "shards training-plan.json", "", "out",
        "shards/config.json shards/shard-00001-model-00001-of-00001.safetensors")  # fmt: skip
    add("place loads.json --ranks 2 --out new.json --quiet", "loads.json", "", "new.json", "loads.json")
    add("place run/loads.jsonl --ranks 2 --out new.json --quiet", "run", "", "new.json", "run/loads.jsonl")
    add("report run", "run", "", "",
        "run/run.json run/metrics.jsonl run/loads.jsonl run/events.json run/summary.json")  # fmt: skip
    add("convert-vmoe published/vmoe --top-k 2 --out out --quiet", "published", "", "out",
        "published/vmoe.index published/vmoe.data-00000-of-00002")  # fmt: skip
    work = ".new.safetensors.work"
    add(BY_NAME["observe"].words, "", f"{work}/run.json {work}/states/stage.json {work}/layers/0.safetensors",
        "new.safetensors", f"{work}/states/00002/000001.safetensors", "observe")  # fmt: skip
    add(BY_NAME["prune"].words, "", ".out.pruning/asked.json .out.pruning/stats.safetensors", "out side", "", "prune")
    last = ".out.finetuning/checkpoint-4"
    add(f"finetune source {TEXT} --sequence-length 16 --steps 6 --batch-size 4 {TRAINING} --resume", "",
        f".out.finetuning/asked.json {last}/complete.json {last}/trainer_state.json {last}/spent.json "
        f"{last}/scheduler.pt {last}/rng_state.pth {last}/optimizer/.metadata", "out",
        f"{last}/weights.safetensors {last}/optimizer/__0_0.distcp", "finetune")  # fmt: skip
    last = "out/checkpoints/checkpoint-8"
    add("pretrain --out out --resume --quiet", "",
        "out/run.json out/data/data.json out/data/tokenizer/tokenizer.json out/data/train.safetensors "
        f"out/metrics.jsonl out/loads.jsonl {last}/complete.json {last}/config.json {last}/trainer_state.json",
        "out/model out/report.json", f"{last}/model.safetensors", "pretrain")  # fmt: skip
    return found


READERS = tuple(_table())
