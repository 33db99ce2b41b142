"""What do the layers of a dense model see and do on text? The model is loaded whole; hidden states stay in memory.

Shapes: B sequences, S tokens of one, T tokens seen, D hidden size, F neurons of an FFN, U experts.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from secateur.errors import SecateurError, foreign
from secateur.files.bytes_in_words import in_words
from secateur.files.memory import free_memory
from secateur.files.progress import OnProgress, no_loading_bars
from secateur.model_folder.read.load import CANNOT_RUN
from secateur.model_folder.read.tensor_files import TensorFiles
from secateur.upcycling.blocks import BLOCKS
from secateur.upcycling.forms import Blueprint
from secateur.upcycling.layouts import layout_of
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents
from secateur.upcycling.recipe import Division, neurons_of
from secateur.upcycling.ridge import RidgeSums
from secateur.upcycling.starts import STARTS, LayerSeen
from secateur.upcycling.targets import BAM

BUSY_SHARE = 0.1  # of the neurons of a token that count as busy, the largest activations
Place = tuple[int, str]  # (layer, "ffn" or "attention")
Look = Callable[[Place, Any, Tensor], None]  # (place, its module, input (T, D))


def sequences(parents: Parents, asked: Asked) -> list[list[Tensor]]:
    """The token sequences of each domain, (S,) each: one domain a parent, or one in all where there is one parent.

    Raises:
        SecateurError: another number of --router-data than of parents, or too little text.
    """
    from secateur.data.calibration import calibrate
    from secateur.data.tokenizer import check_ids, load_tokenizer

    folder = parents.first.path
    tokenizer = load_tokenizer(folder)
    several = len(parents.each) > 1
    if several and len(asked.router_data) != len(parents.each):
        raise SecateurError(
            f"--router-data: found {len(asked.router_data)}, expected one for each of the {len(parents.each)} parents, "
            "in their order"
        )
    specs = [[spec] for spec in asked.router_data] if several else [list(asked.router_data)]
    found = []
    for spec in specs:
        drawn = calibrate(
            tokenizer, spec, samples=asked.samples, sequence_length=asked.sequence_length, seed=asked.seed
        )
        rows = [one.long() for one in drawn.sequences]
        check_ids(max(int(one.max()) for one in rows), parents["vocab_size"], folder)
        found.append(rows)
    return found


@contextlib.contextmanager
def loaded(files: TensorFiles, dtype: Any = "auto") -> Iterator[Any]:
    """The model of a folder, by the class that its config.json names, of transformers or a BAM; no code of it is run.

    Raises:
        SecateurError: it does not fit in memory, or transformers cannot load it whole.
    """
    need, free = files.num_bytes * (2 if dtype == torch.float32 else 1), free_memory()
    if need > free:
        raise SecateurError(f"{files.path}: it needs {in_words(need)} of memory to run, {in_words(free)} are free")
    (name,) = files.config["architectures"]
    with no_loading_bars(), foreign(f"{files.path}: transformers cannot load it"):
        model, info = _class_named(name).from_pretrained(files.path, dtype=dtype, output_loading_info=True)
    if wrong := {key: sorted(map(str, value)) for key, value in info.items() if value}:
        raise SecateurError(f"{files.path}: transformers does not load it whole: {wrong}"[:500])
    yield model.eval()
    del model
    gc.collect()


def _class_named(name: str) -> Any:
    if name == BAM.architecture:
        from secateur.models.bam.modeling import BamForCausalLM

        return BamForCausalLM
    return getattr(transformers, name)


@torch.no_grad()
def look_at(
    parents: Parents,
    domains: Sequence[Sequence[Tensor]],
    look: Callable[[int], Look],
    on: OnProgress,
    kinds: Collection[str] = ("ffn",),
) -> None:
    """Run the first parent on every sequence; `look` gives for a domain what sees the input of each layer's modules."""
    total, done = sum(map(len, domains)), 0
    block = BLOCKS[parents.model_type]
    modules = {"ffn": block.names["up"].partition(".")[0], "attention": block.names["o"].partition(".")[0]}
    with loaded(parents.first.files) as model:
        layers = model.get_submodule(block.layers)
        for number, rows in enumerate(domains):
            see = look(number)
            hooks = [
                layer.get_submodule(modules[kind]).register_forward_pre_hook(
                    _hook(see, (index, kind)), with_kwargs=True
                )
                for index, layer in enumerate(layers)
                for kind in kinds
            ]
            for row in rows:
                with foreign(f"{parents.first.path}: {CANNOT_RUN}"):
                    model(input_ids=row[None], use_cache=False)
                done += 1
                on(done, total)
            for hook in hooks:
                hook.remove()


def _hook(see: Look, place: Place) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        see(place, module, hidden.reshape(-1, hidden.shape[-1]))

    return hook


def activations(module: Any, hidden: Tensor) -> Tensor:
    """(T, F) of the neurons: silu(W_gate h) * (W_up h)."""
    found: Tensor = module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden)
    return found


def router_sums(
    parents: Parents, plan: Blueprint, division: Division, domains: Sequence[Sequence[Tensor]], on: OnProgress
) -> dict[Place, LayerSeen]:
    """What the start of the routers needs of what each sees; see `Start.targets`."""
    kinds = {sees for sees in layout_of(plan).routers(plan, 0).values() if sees != "gate"}
    places = [(layer, kind) for layer in range(parents.layers) for kind in sorted(kinds)]
    sums = {place: RidgeSums.zero(plan.units, parents.hidden) for place in places}
    largest = dict.fromkeys(places, 0.0)
    by_norms = STARTS[plan.start].targets == "norms"

    def look(domain: int) -> Look:
        def see(place: Place, module: Any, hidden: Tensor) -> None:
            if by_norms:
                targets = _norms(module, hidden, plan, division.get(place[0]))
            else:
                targets = torch.zeros(len(hidden), plan.units)
                targets[:, domain] = 1
            sums[place] = sums[place] + RidgeSums.of(hidden, targets)
            largest[place] = max(largest[place], float(hidden.double().norm(dim=1).max()))

        return see

    look_at(parents, domains, look, on, kinds)
    return {place: LayerSeen(sums=one, largest=largest[place]) for place, one in sums.items()}


def _norms(module: Any, hidden: Tensor, plan: Blueprint, listed: Sequence[int] | None) -> Tensor:
    """(T, U) the length of what each expert would add."""
    acts = activations(module, hidden)
    found = []
    for source in plan.experts:
        mine = torch.as_tensor(list(neurons_of(plan, source, listed)))
        found.append((acts[:, mine] @ module.down_proj.weight[:, mine].T).double().norm(dim=1))
    return torch.stack(found, dim=1)


def busy_neurons(parents: Parents, rows: Sequence[Tensor], on: OnProgress) -> list[Tensor]:
    """Of each layer (F, T) bool: whether a neuron is among the `BUSY_SHARE` largest activations of a token."""
    seen: list[list[Tensor]] = [[] for _ in range(parents.layers)]
    count = max(1, int(BUSY_SHARE * parents.width))

    def look(domain: int) -> Look:
        def see(place: Place, module: Any, hidden: Tensor) -> None:
            size = activations(module, hidden).abs()
            busy = torch.zeros_like(size, dtype=torch.bool)
            busy.scatter_(1, size.topk(count, dim=1).indices, True)
            seen[place[0]].append(busy.T)

        return see

    look_at(parents, [rows], look, on)
    return [torch.cat(parts, dim=1) for parts in seen]
