"""What Secateur decided, wrote and said at a known commit, and what it does now, computed by one code path.

`tests/frozen/` holds the reference: ten statistics files, and in JSON {section: {entry: value}} the plans made of them,
the digests of pruned folders, the help texts and the public signatures. `tests/test_frozen.py` compares. Nothing
stores by itself; where a change of behaviour is meant, store again and say in the change which entries differ:

    PYTHONPATH=tests python tests/support/frozen_reference.py --store [plans folders help signatures statistics]

All numbers are dyadic and come from raw bits of PCG64, whose stream NumPy promises not to change: sums of them are
exact in any order, so the reference does not depend on the processor. It does on the pinned transformers (which writes
the source folders) and typer (which lays out the help).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from numpy.random import PCG64
from torch import Tensor, nn
from typer.main import get_command

import secateur
from secateur.cli import app
from secateur.criteria import CRITERIA
from secateur.criteria.router_change import RouterChange
from secateur.criteria.weights import WeightStats
from secateur.data.packing import BlockDataset
from secateur.data.prepare import prepare
from secateur.decide.by_score import ALLOCATIONS, plan_by_criterion
from secateur.decide.keep import Keep
from secateur.decide.model_facts import ModelFacts
from secateur.errors import SecateurError
from secateur.models.vmoe import VMoEConfig, VMoEForImageClassification, VMoEModel
from secateur.models.vmoe.pixels import default_pixels
from secateur.observation.observation import Observation
from secateur.stats import LayerStats, RouterStats
from secateur.train.distributed import launch
from support.tiny_models import FAMILIES, tiny_model
from support.tiny_vision import tiny_vmoe

# What the documents and examples import from inside the package; `secateur.__all__` is added to it.
DOCUMENTED: dict[str, Any] = {
    "data.BlockDataset": BlockDataset,
    "data.prepare": prepare,
    "vision.VMoEConfig": VMoEConfig,
    "vision.VMoEForImageClassification": VMoEForImageClassification,
    "vision.VMoEModel": VMoEModel,
    "vision.default_pixels": default_pixels,
    "launch.join": launch.join,
    "launch.world_size": launch.world_size,
    "launch.rank": launch.rank,
    "launch.once": launch.once,
    "launch.barrier": launch.barrier,
}

HERE = Path(__file__).parents[1] / "frozen"
Value = str | list[str]
Entries = dict[str, Value]

COMMAND = get_command(app)


# --- what all parts share -----------------------------------------------------------------------------------------


def run_command(*words: str, folder: Path) -> str:
    """What `secateur WORDS` prints on standard output when it is run in `folder`, or "error: " and its message.

    Paths are given relative to `folder`, so that none of this machine gets into the result.
    """
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            COMMAND.main([*words], prog_name="secateur", standalone_mode=False)
        except SecateurError as error:
            return f"error: {error}"
    return printed.getvalue()


def digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:12]


def digest_or_error(text: str) -> str:
    return text if text.startswith("error: ") else digest(text)


def draws(name: str, count: int, below: int) -> list[int]:
    """Whole numbers from 0, the same for a name on every machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return [int(value) for value in PCG64(seed).random_raw(count) % below]


def differences(stored: Mapping[str, Value], current: Mapping[str, Value]) -> list[str]:
    """One line for each entry that is not the same."""
    lines = [f"{name}: not there any more" for name in stored if name not in current]
    lines += [f"{name}: not in the reference" for name in current if name not in stored]
    for name in stored:
        if name in current and stored[name] != current[name]:
            lines.append(f"{name}: {_how(stored[name], current[name])}")
    return lines


def _how(stored: Value, current: Value) -> str:
    if isinstance(stored, str) or isinstance(current, str):
        return f"was {stored}, is {current}"
    gone, new = ([line for line in left if line not in right] for left, right in ((stored, current), (current, stored)))
    return f"gone {gone}, new {new}" if gone or new else "the same lines in another order or number"


def read(kind: str) -> dict[str, Entries]:
    """The stored reference of one kind."""
    found: dict[str, Entries] = json.loads((HERE / f"{kind}.json").read_text(encoding="utf-8"))
    return found


# --- plans --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a statistics file is made of.

    experts: of each layer. loads: how tokens are spread, see `_loads`. sums: whether there are sums beside the counts.
    gate_shift: taken from every gate. huge: the largest activation of (layer, expert), all others being small.
    """

    experts: Mapping[int, int]
    loads: str = "spread"
    sums: bool = True
    gate_shift: int = 0
    huge: Mapping[tuple[int, int], int] = field(default_factory=dict)
    num_groups: int = 1
    top_k: int = 2
    min_experts: int = 2
    has_one_count: bool = False
    bytes_per_expert: Sequence[int] = (50,)


STATISTICS: dict[str, Statistics] = {
    "plain": Statistics(experts=dict.fromkeys(range(4), 8)),
    "groups": Statistics(experts={1: 16, 2: 16, 4: 16}, num_groups=4, top_k=4, min_experts=8),
    "uneven": Statistics(experts={1: 6, 3: 8, 4: 12, 9: 16}, huge={(9, 5): 4100}, bytes_per_expert=(50, 70, 33, 101)),
    "unused": Statistics(experts=dict.fromkeys(range(3), 12), loads="unused", bytes_per_expert=(1,)),
    "ties": Statistics(experts={0: 8, 2: 8, 5: 8}, loads="ties"),
    "counts": Statistics(experts={0: 8, 1: 10, 2: 8}, sums=False),
    "super": Statistics(experts=dict.fromkeys(range(8), 8), huge={(0, 3): 4000, (2, 5): 3000, (7, 1): 3900}),
    "negative": Statistics(experts={0: 8, 1: 8, 2: 8}, gate_shift=40),
    "nested": Statistics(experts=dict.fromkeys(range(3), 9), top_k=3, min_experts=3, has_one_count=True),
    "large": Statistics(experts=dict.fromkeys(range(6), 32), loads="steep", top_k=4, min_experts=4,
                        bytes_per_expert=(97, 101, 103, 107, 109, 113)),
}  # fmt: skip

# Those of the table when this was stored. A newer criterion has values by hand, and no entry here.
FROZEN_CRITERIA = [
    "frequency", "soft_frequency", "ean", "man", "msan", "weighted_ean", "reap", "aimer", "weight_norm",
    "router_row_norm", "router_norm_change", "router_norm_absolute_change", "router_difference_norm", "random",
]  # fmt: skip
DATA_CRITERIA = [name for name in FROZEN_CRITERIA if CRITERIA[name].needs_data or CRITERIA[name].needs == "nothing"]
WEIGHT_CRITERIA = [name for name in FROZEN_CRITERIA if name not in DATA_CRITERIA]
RARE = ("--keep 0.6 --ep 2", "--keep 0.7 --no-protect", "--keep 0.6 --removed zero-slot", "--keep 0.7 --min-experts 6")
RULES = ("--alpha 0.4", "--beta 0.25", "--alpha 1.0 --beta 0.3", "--target-params 0.9", "--target-params 0.7",
         "--max-rerouted 0.02", "--max-rerouted 0.15")  # fmt: skip
ON_A_FOLDER = "a model folder"


def make_statistics(name: str) -> Observation:
    """The content of a statistics file; the tests read the stored one and never call this."""
    spec = STATISTICS[name]
    layers = {layer: _layer_stats(f"{name} {layer}", layer, spec) for layer in spec.experts}
    sizes = {layer: spec.bytes_per_expert[turn % len(spec.bytes_per_expert)] for turn, layer in enumerate(spec.experts)}
    facts = ModelFacts(
        model_type="frozen",
        digest=digest(name),
        top_k=spec.top_k,
        num_groups=spec.num_groups,
        min_experts=spec.min_experts,
        total_bytes=sum(spec.experts[layer] * size for layer, size in sizes.items()) * 5 // 4,
        has_one_count=spec.has_one_count,
        num_experts=dict(spec.experts),
        bytes_per_expert=sizes,
    )
    return Observation(stats=RouterStats(layers=layers), model=facts, data={"sources": [f"{name}.jsonl"], "seed": 0})


def _layer_stats(name: str, layer: int, spec: Statistics) -> LayerStats:
    experts = spec.experts[layer]
    loads = _loads(name, experts, spec.loads)
    count = torch.tensor(loads)
    if not spec.sums:
        return LayerStats(num_tokens=sum(loads) // spec.top_k, token_count=count)
    same = spec.loads == "ties"
    gates = [8] * experts if same else [gate + 1 - spec.gate_shift for gate in draws(f"{name} gate", experts, 64)]
    norms = [16] * experts if same else [norm + 1 for norm in draws(f"{name} norm", experts, 96)]
    most = [spec.huge.get((layer, expert), norm) for expert, norm in enumerate(norms)]
    return LayerStats(
        num_tokens=sum(loads) // spec.top_k,
        token_count=count,
        weight_sum=count * _numbers(gates) / 64,
        norm_sum=count * _numbers(norms) / 16,
        norm_square_sum=count * _numbers(norms) ** 2 / 256,
        weighted_norm_sum=count * _numbers(gates) * _numbers(norms) / 1024,
        max_activation=(count > 0) * _numbers(most) / 8,
    )


def _loads(name: str, experts: int, kind: str) -> list[int]:
    drawn = draws(f"{name} load", experts, 400)
    if kind == "ties":
        return [100] * experts
    if kind == "steep":
        return [load * load // 200 + 1 for load in drawn]
    if kind == "unused":
        return [0 if expert % 3 == 1 else load for expert, load in enumerate(drawn)]
    return [load + 20 for load in drawn]


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def plans(section: str) -> Entries:
    """The plans of one statistics file, or those of a model folder."""
    with plans_to_make(section) as found:
        return {name: make() for name, make in found.items()}


@contextlib.contextmanager
def plans_to_make(section: str) -> Iterator[dict[str, Callable[[], str]]]:
    """{entry: what computes it}."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if section == ON_A_FOLDER:
            yield dict(_plans_of_a_folder(folder))
            return
        observation = Observation.load(HERE / f"{section}.safetensors")
        observation.save(folder / "stats")
        yield dict([*_plans_by_command(section, observation, folder), *_plans_by_weights(observation)])


def _plans_by_command(section: str, observation: Observation, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    command = "plan", f"{section}.safetensors", "--dry-run"
    for words in _choices(observation):
        yield words, partial(_printed, *command, "--json", *words.split(), folder=HERE)
    for words in ("--keep 0.75", "--beta 0.2", "--keep 0.5 --allocation laep"):
        yield f"{words}, in words", partial(_printed, *command, *words.split(), folder=HERE)
    yield "the statistics, saved again", lambda: digest((folder / "stats").read_bytes())
    yield "the plan, saved", partial(_saved_plan, folder)


def _printed(*words: str, folder: Path) -> str:
    return digest_or_error(run_command(*words, folder=folder))


def _saved_plan(folder: Path) -> str:
    run_command("plan", "stats", "--criterion", "frequency", "--keep", "0.75", "--out", "plan", folder=folder)
    return digest((folder / "plan").read_bytes())


def _choices(observation: Observation) -> Iterator[str]:
    """The options of `secateur plan` for one statistics file."""
    by_layer = ",".join(f"{layer}:{count * 3 // 4}" for layer, count in _facts(observation).num_experts.items())
    for allocation in ALLOCATIONS:
        for keep in _keeps(observation):
            for criterion in DATA_CRITERIA:
                yield f"--criterion {criterion} --keep {keep} --allocation {allocation}"
        for words in RARE:
            for criterion in ("frequency", "reap"):
                yield f"--criterion {criterion} {words} --allocation {allocation}"
        yield f"--keep {by_layer} --allocation {allocation}"
        yield f"--criterion random --keep 0.6 --seed 5 --allocation {allocation}"
    for allocation in ("uniform", "laep"):  # those that rules know
        for words in RULES:
            yield f"{words} --allocation {allocation}"
            yield f"{words} --allocation {allocation} --ep 2"
    yield f"{RULES[0]} --allocation global"


def _plans_by_weights(observation: Observation) -> Iterator[tuple[str, Callable[[], str]]]:
    """Criteria that read weights, on made-up sums over the weights of such a model."""
    facts = _facts(observation)
    for criterion in WEIGHT_CRITERIA:
        weights = {layer: _weights(criterion, layer, count) for layer, count in facts.num_experts.items()}
        for allocation in ALLOCATIONS:
            for keep in _keeps(observation):
                make = partial(_by_weights, observation, weights, criterion, keep, allocation)
                yield f"{criterion} of weights, keep {keep}, {allocation}", make


def _by_weights(observation: Observation, weights: Any, criterion: str, keep: str, allocation: Any) -> str:
    facts = _facts(observation)
    arguments = {"stats": observation.stats, "weights": weights, "sizes": facts.sizes}
    try:
        plan = plan_by_criterion(criterion, Keep.parse(keep), facts.limits(), allocation=allocation, **arguments)
    except SecateurError as error:
        return f"error: {error}"
    return digest(json.dumps(plan.to_json()))


def _weights(criterion: str, layer: int, experts: int) -> Any:
    one, two, three = (_numbers(draws(f"weights {layer} {part}", experts, 24)) + 1 for part in range(3))
    if CRITERIA[criterion].needs == "router change":
        return RouterChange(norm_before=one / 8, norm_after=two / 8, norm_of_difference=three / 8)
    return WeightStats(
        num_weights=torch.full((experts,), 64),
        absolute_sum=one,
        square_sum=(three > 2) * two**2,  # some experts are all 0
        router_square_sum=three**2 / 16,
    )


def _keeps(observation: Observation) -> tuple[str, ...]:
    facts = _facts(observation)
    count = min(facts.num_experts.values()) * 3 // 4
    return "0.75", "0.5", str(count), f"{facts.total_bytes * 7 // 10}B"


def _facts(observation: Observation) -> ModelFacts:
    assert observation.model is not None
    return observation.model


def _plans_of_a_folder(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Criteria that read weights, on a model and the one it was fine-tuned from."""
    for name in ("base", "model"):
        save_source(tiny_model("qwen3_moe"), folder / name, seed=name)
    for criterion in [*WEIGHT_CRITERIA, "random"]:
        change = CRITERIA[criterion].needs == "router change"
        for allocation in ALLOCATIONS:
            for keep in ("0.75", "5"):
                words = f"--criterion {criterion} --keep {keep} --allocation {allocation}"
                words += " --pretrained base" if change else ""
                yield words, partial(_printed, "plan", "model", "--dry-run", "--json", *words.split(), folder=folder)


# --- folders ------------------------------------------------------------------------------------------------------

VISION = ("few places", "ensemble")
WITH_UNDO = ("qwen3_moe", "gpt_oss", "ernie4_5_moe", "dbrx")
WITH_ZERO_SLOTS = ("qwen3_moe", "deepseek_v3 grouped", "gpt_oss", "inkling_text")
CODE = "modeling_secateur.py"  # written into folders that need it; it has an entry of its own
EVERY_FOLDER = "every folder"


def folders(section: str) -> Entries:
    """Digests of what `secateur apply` makes of a row of FAMILIES, or of "V-MoE KIND"."""
    if section == EVERY_FOLDER:
        return {CODE: _code_file()}
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        layers, num_groups = _make_source(section, work / "source")
        for name, uniform in (("one count", True), ("different counts", False)):
            (work / f"{name}.json").write_text(json.dumps(frozen_plan(layers, num_groups, uniform=uniform)))
        entries = {"source": digest(json.dumps(_digests(work / "source")))}  # differs where transformers does
        entries |= _applied(work, "one count") | _applied(work, "different counts")
        if section in WITH_UNDO:
            entries |= _undone(work)
        if section in WITH_ZERO_SLOTS:
            entries |= _applied(work, "different counts", "--removed", "zero-slot")
    return dict(entries)


def _make_source(section: str, folder: Path) -> tuple[tuple[int, ...], int]:
    """A model folder; its MoE layers, and the groups of experts that must stay equally large."""
    kind = section.removeprefix("V-MoE ")
    if kind != section:
        save_source(tiny_vmoe(kind), folder)
        return (0, 2), 2 if kind == "ensemble" else 1
    save_source(tiny_model(section), folder)
    return FAMILIES[section].layers, FAMILIES[section].num_groups


def save_source(model: nn.Module, folder: Path, *, seed: str = "") -> None:
    """A folder of several files, with weights drawn by name and no version of transformers in it."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # steps of 1/64 from -2: exact in every type of weights
                values = _numbers(draws(f"{seed} {name}", tensor.numel(), 256)) / 64 - 2
                tensor.copy_(values.reshape(tensor.shape))
    model.save_pretrained(folder, max_shard_size="60KB")  # type: ignore[operator]
    for path in folder.glob("*config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "frozen"}, indent=2))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (folder / "more").mkdir()
    (folder / "more" / "vocabulary.txt").write_text("a\nb\n")


def frozen_plan(layers: Sequence[int], num_groups: int, *, uniform: bool) -> dict[str, Any]:
    """A plan file for layers of 8 experts: one count and the old order, or different counts and a reversed order."""
    size = 8 // num_groups
    orders = {}
    for turn, layer in enumerate(layers):
        drops = 1 if num_groups > 1 else 2
        drops += 0 if uniform else turn % 2
        order: list[int] = []
        for group in range(num_groups):
            gone = {(turn + group + 3 * step) % size for step in range(drops)}  # 3 and the size are coprime
            kept = [group * size + expert for expert in range(size) if expert not in gone]
            order += kept if uniform else kept[::-1]
        orders[str(layer)] = {"experts_before": 8, "order": order}
    return {"format": "secateur-plan", "version": 1, "criterion": "frozen", "layers": orders}


def _applied(work: Path, plan: str, *words: str) -> dict[str, str]:
    out = " ".join([plan, *words])
    printed = run_command("apply", "source", f"{plan}.json", "--out", out, *words, folder=work)
    return {f"{out}: printed": digest_or_error(printed)} | _digests(work / out)


def _undone(work: Path) -> dict[str, str]:
    """The undo folder, and the source that it brings back."""
    run_command("apply", "source", "different counts.json", "--out", "pruned", "--undo", "undo", folder=work)
    printed = run_command("apply", "pruned", "undo", "--out", "restored", folder=work)
    return {"restored: printed": digest_or_error(printed)} | _digests(work / "undo") | _digests(work / "restored")


def _digests(folder: Path) -> dict[str, str]:
    """{file: digest}, all safetensors files as one, their names and headers included.

    Only the version of Secateur is taken out: paths are relative, and nothing that is written holds a time.
    """
    weights = hashlib.sha256()
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.suffix == ".safetensors":
            weights.update(f"{name} {len(data)}\n".encode() + data)
        else:
            found[f"{folder.name}: {name}"] = "there" if name == CODE else digest(_without_version(data))
    return found | {f"{folder.name}: weights": weights.hexdigest()[:12]}


def _without_version(data: bytes) -> bytes:
    version = secateur.__version__.encode()
    for before, after in ((b'"secateur": "', b'"'), (b"(Secateur ", b")")):
        data = data.replace(before + version + after, before + after)
    return data


def _code_file() -> str:
    """The file that pruned folders carry, which must stay one file that needs no Secateur."""
    with tempfile.TemporaryDirectory() as made:
        layers, num_groups = _make_source("qwen3_moe", Path(made) / "source")
        (Path(made) / "plan.json").write_text(json.dumps(frozen_plan(layers, num_groups, uniform=False)))
        run_command("apply", "source", "plan.json", "--out", "out", folder=Path(made))
        return digest((Path(made) / "out" / CODE).read_bytes())


# --- help texts ---------------------------------------------------------------------------------------------------

PLAIN_TERMINAL = {"COLUMNS": "100", "LINES": "50", "NO_COLOR": "1", "TERM": "dumb"}


def help_texts(section: str) -> Entries:
    """The help of "secateur" or of "secateur COMMAND", in a plain terminal of 100 columns."""
    _, *words = section.split()
    for option in (one for word in words for one in COMMAND.commands[word].params if one.name == "criterion"):
        for name in CRITERIA.keys() - set(FROZEN_CRITERIA):
            option.help = option.help.replace(f"{name}: {CRITERIA[name].help}; ", "")
    with mock.patch.dict(os.environ, PLAIN_TERMINAL):
        printed = run_command(*words, "--help", folder=HERE)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)  # typer colours it for GITHUB_ACTIONS
    return {"lines": [line.rstrip(" │─╮╯") for line in plain.splitlines()]}  # without the right side of the frames


# --- signatures ---------------------------------------------------------------------------------------------------

SPECIAL = ("__init__", "__call__", "__add__", "__eq__", "__len__", "__getitem__", "__iter__")


def public() -> dict[str, Any]:
    return {name: getattr(secateur, name) for name in secateur.__all__} | DOCUMENTED


def signatures(section: str) -> Entries:
    """The kind of a public name, its signature, fields, methods and properties; modules are left out, they may move."""
    thing = public()[section]
    if not inspect.isclass(thing):
        return {"function": _signature(thing)}
    entries = {"class": f"({', '.join(base.__name__ for base in thing.__bases__)})"}
    if dataclasses.is_dataclass(thing):
        entries |= {f"field {one.name}": _field(one) for one in dataclasses.fields(thing)}
    return dict(entries | _members(thing, without={name.removeprefix("field ") for name in entries}))


def _members(thing: type, without: Set[str]) -> dict[str, str]:
    """Methods, properties and attributes that Secateur gives a class, not those of classes of other packages."""
    ours = [one for one in thing.__mro__ if one.__module__.split(".")[0] == "secateur"]
    names = {name for one in ours for name in vars(one) if name in SPECIAL or not name.startswith("_")}
    found = {}
    for name in sorted(names - without):
        member = inspect.getattr_static(thing, name)
        if isinstance(member, property):
            found[f"property {name}"] = _signature(member.fget)
        elif isinstance(member, classmethod | staticmethod):
            found[f"{type(member).__name__} {name}"] = _signature(member.__func__)
        elif inspect.isfunction(member):
            found[f"method {name}"] = _signature(member)
        else:
            found[f"attribute {name}"] = _plain(repr(member))
    return found


def _signature(thing: Any) -> str:
    return _plain(str(inspect.signature(thing)))


def _field(one: dataclasses.Field[Any]) -> str:
    if one.default is not dataclasses.MISSING:
        return _plain(f"{one.type} = {one.default!r}")
    if one.default_factory is not dataclasses.MISSING:
        return _plain(f"{one.type} = {one.default_factory()!r}")
    return _plain(str(one.type))


def _plain(text: str) -> str:
    """Without modules of ours and addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"\bsecateur\.(\w+\.)*(?=\w)", "", text))


# --- the table, and storing ---------------------------------------------------------------------------------------

# kind -> (its sections, what computes one of them)
KINDS: dict[str, tuple[Sequence[str], Callable[[str], Entries]]] = {
    "plans": ((*STATISTICS, ON_A_FOLDER), plans),
    "folders": ((*FAMILIES, *(f"V-MoE {kind}" for kind in VISION), EVERY_FOLDER), folders),
    "help": (("secateur", *(f"secateur {name}" for name in COMMAND.commands)), help_texts),  # type: ignore[attr-defined]
    "signatures": (tuple(public()), signatures),
}


def store(kind: str) -> None:
    """Write the reference of one kind anew, or the statistics files."""
    if kind == "statistics":
        for name in STATISTICS:
            make_statistics(name).save(HERE / f"{name}.safetensors")
        return
    sections, compute = KINDS[kind]
    content = {section: compute(section) for section in sections}
    (HERE / f"{kind}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["statistics", *KINDS]
    parser.add_argument("--store", nargs="*", choices=choices, help="what to write anew; all but statistics if bare")
    chosen = parser.parse_args().store
    if chosen is None:
        parser.error("nothing is stored without --store")
    for kind in chosen or KINDS:
        store(kind)


if __name__ == "__main__":
    main()
