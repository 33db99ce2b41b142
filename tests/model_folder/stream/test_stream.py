"""How a model is streamed: what is in memory when, what is checked between layers, and which folders are refused."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.data.batch import Batch
from secateur.errors import SecateurError
from secateur.model_folder.stream import parts
from secateur.model_folder.stream.lazy_tensor import LazyTensor
from secateur.model_folder.stream.relay import Relay
from secateur.model_folder.stream.resume import WorkFolder
from secateur.model_folder.stream.run import StreamedModel
from secateur.model_folder.stream.states import DiskStates, MemoryStates, States
from support.model_folders import INDEX, saved, write
from support.odd_folders import deepseek, with_mtp
from support.streamed_runs import RAGGED, found_in, random_data

BATCHES = random_data().batches(2)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a model of several files, and its index with them."""
    listed = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def bytes_loaded(model: nn.Module) -> int:
    return sum(one.nbytes for one in [*model.parameters(), *model.buffers()] if not one.is_meta)


def test_one_layer_at_a_time_is_in_memory_and_each_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("mixtral", tmp_path / "model")
    streamed = StreamedModel(found_in(tmp_path / "model"))
    sizes = streamed.part_bytes()
    files = sum(one.length for one in found_in(tmp_path / "model").files.tensors.values())
    assert sum(sizes.values()) == files
    read: list[int] = []
    original = LazyTensor.read_into

    def read_into(self: LazyTensor, memory: memoryview) -> None:
        read.append(len(memory))
        original(self, memory)

    monkeypatch.setattr(LazyTensor, "read_into", read_into)
    in_memory: list[int] = []
    steps: list[tuple[int, int]] = []

    @contextmanager
    def visit(layer: int, module: nn.Module) -> Iterator[Callable[[Batch], None]]:
        assert not any(one.is_meta for one in module.parameters())
        yield lambda batch: in_memory.append(bytes_loaded(streamed.model))

    states = MemoryStates()
    streamed.run_layers(BATCHES, states, visit=visit, on_step=lambda done, total: steps.append((done, total)))
    rotary = 2 * 4 * 4  # two buffers of half a head's width
    assert in_memory == [sizes["outside"] + rotary + sizes[layer] for layer in range(3) for _ in BATCHES]
    assert max(in_memory) < 0.6 * files
    assert sum(read) == files - sizes["head"]
    assert sorted(set(steps)) == [(done, 9) for done in range(10)]
    assert bytes_loaded(streamed.model) == 0

    read.clear()
    streamed.run_head(BATCHES, states, use=lambda index, batch, logits: in_memory.append(bytes_loaded(streamed.model)))
    assert in_memory[-3:] == [sizes["outside"] + rotary + sizes["head"]] * 3
    assert sum(read) == sizes["outside"] + sizes["head"]


def test_a_tensor_that_is_a_piece_of_a_larger_one_lets_go_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("mixtral", tmp_path / "model")
    streamed, load = StreamedModel(found_in(tmp_path / "model")), parts.convert_and_load_state_dict_in_model

    def load_in_pieces(model: Any, *rest: Any) -> Any:
        result = load(model, *rest)
        for one in model.parameters():
            if not one.is_meta:
                one.data = torch.stack([one.data, one.data])[1]
        return result

    monkeypatch.setattr(parts, "convert_and_load_state_dict_in_model", load_in_pieces)

    @contextmanager
    def visit(layer: int, module: nn.Module) -> Iterator[Callable[[Batch], None]]:
        assert all(one.untyped_storage().nbytes() == one.nbytes for one in module.parameters())
        yield lambda batch: None

    streamed.run_layers(BATCHES[:1], MemoryStates(), visit=visit)


def test_a_streamed_model_can_be_run_again(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    streamed, runs = StreamedModel(found_in(tmp_path / "model")), []
    for _ in range(2):
        states = MemoryStates()
        streamed.run_layers(BATCHES, states)
        runs.append([states.get(3, index)[0] for index in range(len(BATCHES))])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_states_give_back_the_bits_that_were_put(kind: str, tmp_path: Path) -> None:
    states: States = MemoryStates() if kind == "memory" else DiskStates(tmp_path / "states")
    first = [torch.randn(2, 3, 4).to(torch.bfloat16), torch.randn(1, 3, 4).transpose(1, 2)]
    for index, value in enumerate(first):
        states.put(1, index, value)
    states.form = "tensor"
    states.finish(1)
    for index, value in enumerate(first):
        found, _ = states.get(1, index)
        assert torch.equal(found, value)
        assert found.dtype == value.dtype
        assert found.data_ptr() % 64 == 0 or kind == "memory"
        states.put(2, index, value + 1)
    states.form = "tensor"
    states.finish(2)
    assert torch.equal(states.get(2, 1)[0], first[1] + 1)


def test_only_finished_stages_on_the_disk_count(tmp_path: Path) -> None:
    states = DiskStates(tmp_path / "states")
    states.put(1, 0, torch.ones(1))
    assert DiskStates(tmp_path / "states").first == 0
    assert not any(path.is_dir() for path in (tmp_path / "states").iterdir())
    states.put(1, 0, torch.ones(1))
    states.form = "tuple 2"
    states.finish(1)
    states.put(2, 0, torch.ones(1))
    again = DiskStates(tmp_path / "states")
    assert (again.first, again.form) == (1, "tuple 2")
    assert torch.equal(again.get(1, 0)[0], torch.ones(1))
    (tmp_path / "states/stage.json").write_text('{"stage": "x"}')
    with pytest.raises(SecateurError, match="not what an unfinished run writes"):
        DiskStates(tmp_path / "states")


def test_an_unfinished_run_goes_on_only_where_all_that_decides_it_is_the_same(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "stats")
    for run in ({"seed": 1, "data": {"a": [1]}}, {"data": {"a": [1]}, "seed": 1}):
        with contextlib.suppress(KeyboardInterrupt), work.opened(run):
            assert work.is_begun
            raise KeyboardInterrupt
        assert work.is_begun
    for run, message in (
        ({"seed": 1, "data": {"a": [1]}, "device": "cpu"}, "device was None, is 'cpu'"),
        ({"seed": 1}, r"data was \{'a': \[1\]\}, is None"),
        ({"seed": 2, "data": {"a": [1]}}, "seed was 1, is 2"),
    ):
        with (
            pytest.raises(SecateurError, match=rf"an unfinished run of something else \({message}\)"),
            work.opened(run),
        ):
            pass


def test_layers_for_further_tokens_are_not_run(tmp_path: Path) -> None:
    results = []
    for name, content in (("with", with_mtp("model.layers.3.")), ("without", deepseek())):
        streamed, states = StreamedModel(found_in(write(tmp_path / name, *content))), MemoryStates()
        streamed.run_layers(BATCHES, states)
        results.append([states.get(3, index)[0] for index in range(len(BATCHES))])
        assert streamed.num_layers == 3
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("ending", ["mlp.experts.gate_up_proj", "input_layernorm.weight"])
def test_weights_that_are_no_numbers_are_named_by_their_layer(ending: str, tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model", save_original_format=False)

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(f"layers.1.{ending}"):
                tensors[name].fill_(torch.nan)

    change(tmp_path / "model", spoil)
    with pytest.raises(
        SecateurError, match=r"mixtral.*what decoder layer 1 hands on is not finite; either its weights"
    ):
        StreamedModel(found_in(tmp_path / "model")).run_layers(BATCHES, MemoryStates())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")

    def take_one(tensors: dict[str, Tensor]) -> None:
        tensors.pop("model.layers.2.input_layernorm.weight", None)

    change(tmp_path / "model", take_one)
    with pytest.raises(SecateurError, match=r"1 tensors are missing, such as model.layers.2.input_layernorm.weight"):
        StreamedModel(found_in(tmp_path / "model")).run_layers(BATCHES, MemoryStates())


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")

    def add_one(tensors: dict[str, Tensor]) -> None:
        if "model.norm.weight" in tensors:
            tensors["model.layers.0.extra"] = torch.ones(1)

    change(tmp_path / "model", add_one)
    with pytest.raises(SecateurError, match=r"1 tensors have no place in MixtralForCausalLM: model.layers.0.extra"):
        StreamedModel(found_in(tmp_path / "model"))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")

    def widen(tensors: dict[str, Tensor]) -> None:
        if "model.layers.1.self_attn.q_proj.weight" in tensors:
            tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(3, 3)

    change(tmp_path / "model", widen)
    with pytest.raises(
        SecateurError, match=r"config\.json does not fit the weights: .*model.layers.1.self_attn.q_proj.weight"
    ):
        StreamedModel(found_in(tmp_path / "model")).run_layers(BATCHES, MemoryStates())


def test_a_quantised_model_is_refused_with_its_method(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    edit_config(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    with pytest.raises(SecateurError, match=r"its weights are quantised \(fp8\), and only plain ones can be computed"):
        StreamedModel(found_in(tmp_path / "model"))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    streamed = StreamedModel(found_in(tmp_path / "model"))
    for path in (tmp_path / "model").glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SecateurError, match="has become shorter while it was read"):
        streamed.run_layers(BATCHES, MemoryStates())


def test_switches_that_keep_values_of_all_layers_are_off(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    edit_config(tmp_path / "model", output_router_logits=True, output_hidden_states=True)
    streamed, states = StreamedModel(found_in(tmp_path / "model")), MemoryStates()
    streamed.run_layers(BATCHES, states)
    logits: list[Tensor] = []
    streamed.run_head(BATCHES, states, use=lambda index, batch, found: logits.append(found))
    assert len(logits) == len(BATCHES)


class Trunk(nn.Module):
    """Three layers that add 1, 2 and 4; `between` is what happens to the hidden states before each."""

    def __init__(self, between: Callable[[int, list[Tensor]], tuple[Any, ...]], layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(2**number) for number in range(3))
        self._between = between

    def forward(self, hidden: Tensor) -> Tensor:
        seen, shared = [hidden], {}
        for number, layer in enumerate(self.layers):
            result = layer(*self._between(number, seen), shared=shared)
            seen.append(result if isinstance(result, Tensor) else result[0])
        return seen[-1]


class Plain(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: Tensor, other: Any = None, shared: Any = None) -> Any:
        return hidden + self.number


class Pair(Plain):
    def forward(self, hidden: Tensor, other: Any = None, shared: Any = None) -> Any:
        return hidden + self.number, None


class Generous(Plain):
    def forward(self, hidden: Tensor, other: Any = None, shared: Any = None) -> Any:
        return hidden + self.number, hidden


class Leaving(Plain):
    def forward(self, hidden: Tensor, other: Any = None, shared: Any = None) -> Any:
        shared[self.number] = hidden
        return hidden + self.number


class Listing(Plain):
    def forward(self, hidden: Tensor, other: Any = None, shared: Any = None) -> Any:
        other.append(hidden)
        return hidden + self.number


def relayed(trunk: Trunk, start: Tensor) -> Tensor:
    """What the last layer returns, by one run a layer and one for the end."""
    relay, hidden = Relay(trunk.layers, None), start
    with relay.installed():
        for stage in range(3):
            output, hidden = relay.run(stage, hidden if stage else None, lambda: trunk(start), checks=True)
            assert output is None
        output, _ = relay.run(3, hidden, lambda: trunk(start), checks=True)
    assert "forward" not in vars(trunk.layers[0])
    return output


@pytest.mark.parametrize("layer", [Plain, Pair])
def test_what_the_model_does_between_neighbouring_layers_is_kept(layer: type[nn.Module]) -> None:
    trunk = Trunk(lambda number, seen: (seen[-1] * 10, number), layer)
    assert float(relayed(trunk, torch.ones(1))) == float(trunk(torch.ones(1))) == ((10 + 1) * 10 + 2) * 10 + 4


@pytest.mark.parametrize(
    ("between", "layer", "message"),
    [
        (lambda number, seen: (seen[-1], seen[1] if number == 2 else None), Plain, "layer 2 gets `1` from earlier"),
        (lambda number, seen: (seen[-1], {"a": [seen[-2]]} if number == 2 else None), Plain, "gets `1` from earlier"),
        (lambda number, seen: (seen[-1], object()), Plain, "decoder layer 0 gets `1`, a object"),
        (lambda number, seen: (seen[-1],), Generous, "decoder layer 0 also returns Tensor"),
        (lambda number, seen: (seen[-1],), Leaving, "decoder layer 0 leaves 1 in `shared`, a Tensor; lay"),
        (lambda number, seen: (seen[-1], []), Listing, "decoder layer 0 leaves values for later layers"),
        (lambda number, seen: (None,), Plain, "decoder layer 0 is called with NoneType"),
    ],
)
def test_whatever_else_layers_exchange_is_refused(between: Any, layer: type[nn.Module], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        relayed(Trunk(between, layer), torch.ones(1))


def test_a_sum_of_several_layers_is_poisoned_and_so_never_silent() -> None:
    trunk = Trunk(lambda number, seen: (seen[-1] + (seen[1] if number == 2 else 0),), Plain)
    relay = Relay(trunk.layers, None)
    with relay.installed():
        _, hidden = relay.run(0, None, lambda: trunk(torch.ones(1)), checks=True)
        _, hidden = relay.run(1, hidden, lambda: trunk(torch.ones(1)), checks=True)
    assert bool(hidden.isnan().all())


def test_layers_out_of_order_or_left_out_are_refused() -> None:
    trunk = Trunk(lambda number, seen: (seen[-1],), Plain)
    relay = Relay(trunk.layers, None)
    with relay.installed():
        with pytest.raises(SecateurError, match="decoder layer 1 was called where layer 0 was expected"):
            relay.run(0, None, lambda: trunk.layers[1](torch.ones(1)), checks=True)
        with pytest.raises(SecateurError, match="0 of 3 decoder layers were called, expected all"):
            relay.run(0, None, lambda: None, checks=True)


def test_a_layer_that_is_left_out_on_the_way_to_the_head_is_noticed() -> None:
    trunk = Trunk(lambda number, seen: (seen[-1],), Plain)
    relay = Relay(trunk.layers, "tensor")
    with relay.installed(), pytest.raises(SecateurError, match="2 of 3 decoder layers were called, expected all"):
        relay.run(3, torch.ones(1), lambda: trunk.layers[1](trunk.layers[0](torch.ones(1))), checks=True)


def test_a_model_that_goes_on_where_its_last_layer_ended_the_forward_is_noticed() -> None:
    trunk = Trunk(lambda number, seen: (seen[-1],), Plain)
    relay = Relay(trunk.layers, "tensor")

    def swallowing() -> None:
        with suppress(Exception):
            trunk(torch.ones(1))

    with relay.installed(), pytest.raises(SecateurError, match="decoder layers were called, expected all"):
        relay.run(2, torch.ones(1), swallowing, checks=True)


def with_one_more(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "more": object()}


def test_what_else_a_layer_is_called_with_is_looked_at_in_the_first_batch(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    streamed = StreamedModel(found_in(tmp_path / "model"))
    streamed.text.model.layers[1].register_forward_pre_hook(with_one_more, with_kwargs=True)
    with pytest.raises(SecateurError, match="decoder layer 1 gets `more`, a object; layers of this model exchange"):
        streamed.run_layers(BATCHES, MemoryStates())


@pytest.mark.parametrize("is_padding", [True, False])
def test_padding_may_be_no_number_and_a_token_may_not(is_padding: bool, tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    streamed, states, shapes = StreamedModel(found_in(tmp_path / "model")), MemoryStates(), []
    batches = random_data(RAGGED).batches(2)

    @contextmanager
    def visit(layer: int, module: nn.Module) -> Iterator[Callable[[Batch], None]]:
        wrong: list[Tensor] = []

        def spoil(mlp: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.masked_fill(wrong.pop()[..., None], torch.nan)

        def before(batch: Batch) -> None:
            assert batch.attention_mask is not None
            wrong.append(batch.attention_mask.bool() != is_padding)

        if layer < 2:
            yield lambda batch: None
            return
        handle = module.mlp.register_forward_hook(spoil)  # type: ignore[union-attr]
        yield before
        handle.remove()

    if not is_padding:
        with pytest.raises(SecateurError, match="what decoder layer 2 hands on is not finite"):
            streamed.run_layers(batches, states, visit=visit)
        return
    streamed.run_layers(batches, states, visit=visit)
    streamed.run_head(batches, states, use=lambda index, batch, logits: shapes.append(logits.shape[1]))
    assert states.get(3, 0)[0][1, 7:].isnan().all()
    assert shapes == [12, 12, 5]


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")

    def spoil(tensors: dict[str, Tensor]) -> None:
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][5] = torch.inf

    change(tmp_path / "model", spoil)
    streamed, states = StreamedModel(found_in(tmp_path / "model")), MemoryStates()
    streamed.run_layers(BATCHES, states)
    with pytest.raises(SecateurError, match="its logits are not finite, or need more than the last layer"):
        streamed.run_head(BATCHES, states, use=lambda index, batch, logits: None)
