"""Statistics are sums: they add up exactly, survive a file, and refuse what is not a count."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import safetensors.torch
import torch

from secateur.errors import SecateurError
from secateur.stats import DEFAULT_SUMS, SUMS, LayerStats, RouterStats, recorded
from secateur.stats.file import VERSIONS
from support.made_up_sums import random_sums
from support.toy_layer import TOY, Layer, random_layer

LOADS = {3: [5, 40, 10], 0: [7, 0]}


def test_windows_add_up_in_any_order_and_grouping() -> None:
    rng = random.Random(0)
    windows = [
        RouterStats.from_loads({0: [rng.randrange(100) for _ in range(4)], 2: [rng.randrange(100)]}, 10)
        for _ in range(5)
    ]
    total = windows[0] + windows[1] + windows[2] + windows[3] + windows[4]
    other = (windows[4] + windows[2]) + (windows[1] + (windows[0] + windows[3]))
    assert total == other
    assert total.layers[0].num_tokens == 50
    assert total.loads()[0] == [sum(window.loads()[0][expert] for window in windows) for expert in range(4)]


def test_counts_beyond_float_precision_stay_exact() -> None:
    big = 2**62 + 1
    assert (RouterStats.from_loads({0: [big, 1]}, 1) + RouterStats.from_loads({0: [2, 1]}, 1)).loads() == {
        0: [big + 2, 2]
    }


def test_layers_are_listed_in_ascending_order_with_plain_integers() -> None:
    loads = RouterStats.from_loads(LOADS, 55).loads()
    assert list(loads.items()) == [(0, [7, 0]), (3, [5, 40, 10])]
    assert all(type(count) is int for counts in loads.values() for count in counts)


def test_a_value_does_not_follow_the_accumulator_it_was_made_from() -> None:
    counter = torch.tensor([1, 2, 3])
    stats = LayerStats(num_tokens=3, token_count=counter)
    counter.zero_()
    assert stats.token_count.tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_every_integer_type_becomes_int64(dtype: torch.dtype) -> None:
    stats = LayerStats(num_tokens=3, token_count=torch.tensor([1, 2], dtype=dtype))
    assert stats.token_count.dtype is torch.int64
    assert stats.num_experts == 2


def test_files_and_json_read_back_equal(tmp_path: Path) -> None:
    stats = RouterStats.from_loads(LOADS, 55)
    stats.save(tmp_path / "a.safetensors")
    stats.save(tmp_path / "b.safetensors")
    assert RouterStats.load(tmp_path / "a.safetensors") == stats
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert RouterStats.from_json(stats.to_json()) == stats


def test_digest_depends_on_the_content_only() -> None:
    stats = RouterStats.from_loads(LOADS, 55)
    assert stats.digest() == RouterStats.from_loads(dict(reversed(LOADS.items())), 55).digest()
    others = [
        RouterStats.from_loads(LOADS, 54),
        RouterStats.from_loads({**LOADS, 0: [0, 7]}, 55),
        RouterStats.from_loads({1: [7, 0], 3: [5, 40, 10]}, 55),
        RouterStats.from_loads({0: [7], 3: [5, 40, 10]}, 55),
    ]
    assert len({stats.digest(), *(other.digest() for other in others)}) == 5


def test_digest_is_the_sha256_of_the_canonical_text() -> None:
    # sha256sum of {"format":"secateur-stats","layers":{"0":{"num_tokens":2,"token_count":[1,3]}},"version":1}
    assert (
        RouterStats.from_loads({0: [1, 3]}, 2).digest()
        == "5cd1052c661f8ce1be1bb841cbaf5d618a422160c5ec24edcce691360317f81a"
    )


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({0: [1, 2]}, {1: [1, 2]}, r"layers \[0, 1\] are in one of them only"),
        ({0: [1, 2], 4: [1, 2]}, {0: [1, 2], 4: [1]}, "layer 4: statistics of 2 and of 1 experts"),
    ],
)
def test_statistics_of_different_models_do_not_add_up(first: Any, second: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        RouterStats.from_loads(first, 1) + RouterStats.from_loads(second, 1)


@pytest.mark.parametrize(
    ("tokens", "count", "message"),
    [
        (-1, torch.tensor([1]), "num_tokens is -1"),
        (1.0, torch.tensor([1]), "num_tokens is 1.0"),
        (1, torch.tensor([3, -2]), "token_count of expert 1 is -2"),
        (1, torch.tensor([1.0]), "token_count has type torch.float32"),
        (1, torch.tensor([True]), "token_count has type torch.bool"),
        (1, torch.tensor([[1]]), r"token_count is \(1, 1\)"),
        (1, torch.tensor([], dtype=torch.int64), r"token_count is \(0,\)"),
        (1, [1], r"token_count is \[1\]"),
    ],
)
def test_what_is_not_a_count_is_refused(tokens: Any, count: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        LayerStats(num_tokens=tokens, token_count=count)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({}, "no layer"),
        ({-1: [1]}, "layer id is -1"),
        ({2: [1, -1]}, "layer 2: token_count of expert 1 is -1"),
        ({2: [1, 0.5]}, "layer 2: a token count is 0.5"),
        ({2: [1, True]}, "layer 2: a token count is True"),
        ({2: [2**63]}, "layer 2: "),
        ({2: []}, r"layer 2: token_count is \(0,\)"),
    ],
)
def test_bad_loads_are_refused_by_layer(loads: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        RouterStats.from_loads(loads, 1)


LAYER = {"num_tokens": 1, "token_count": [1]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"statistics: found \[\], expected an object"),
        ({"format": "secateur-stats", "version": 3, "layers": {"0": LAYER}}, "'version' is 3, expected one of 1, 2"),
        ({"format": "secateur-stats", "version": True, "layers": {"0": LAYER}}, "'version' is True, expected 1"),
        ({"format": "secateur", "version": 2, "layers": {"0": LAYER}}, "'format' is 'secateur', expected 'secateur-st"),
        ({"format": "secateur-stats", "version": 1, "layers": {"00": LAYER}}, "'layers' has the key '00'"),
        ({"format": "secateur-stats", "version": 1, "layers": {"0": {**LAYER, "x": 1}}}, "'layers.0.x' is unknown"),
        (
            {"format": "secateur-stats", "version": 1, "layers": {"0": {**LAYER, "norm_sum": [1.0]}}},
            "'layers.0.norm_sum' is unknown, expected num_tokens, token_count",
        ),
        (
            {"format": "secateur-stats", "version": 2, "layers": {"0": {"norm_sum": [1.0]}}},
            "'layers.0.num_tokens' is missing",
        ),
        (
            {"format": "secateur-stats", "version": 2, "layers": {"0": {**LAYER, "norm_sum": ["1"]}}},
            r"'layers.0.norm_sum\[0\]' is '1', expected a number",
        ),
        (
            {"format": "secateur-stats", "version": 1, "layers": {"0": {**LAYER, "token_count": 3.5}}},
            "'layers.0.token_count' is 3.5, expected a list",
        ),
        ({"format": "secateur-stats", "version": 1, "layers": [LAYER]}, "'layers' is .*, expected an object"),
    ],
)
def test_damaged_json_is_refused(data: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        RouterStats.from_json(data)


def wide(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64)


def layer_file(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a file with one layer of one expert, some of them others."""
    plain = {"num_tokens": torch.tensor([1]), "token_count": torch.tensor([1])}
    return {f"layers.0.{name}": value for name, value in (plain | tensors).items()}


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    with pytest.raises(SecateurError, match=r"stats.safetensors: cannot be read"):
        RouterStats.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(SecateurError, match=r"stats.safetensors: cannot be read"):
        RouterStats.load(path)
    format_, shaped = {"format": "secateur-stats/1"}, {"format": "secateur-stats/3"}
    contents = [
        ({"weight": torch.ones(2)}, {}, "format is None"),
        ({"weight": torch.ones(2)}, format_, "unknown tensor weight"),
        ({"layers.0.token_count": torch.tensor([1])}, format_, "'layers.0.num_tokens' is missing"),
        ({"layers.00.token_count": torch.tensor([1])}, format_, "unknown tensor layers.00.token_count"),
        ({"layers.1000000.token_count": torch.tensor([1])}, format_, "unknown tensor layers.1000000.token_count"),
        (layer_file(token_count=torch.ones(1)), format_, r"count is F32 \(1,\), expected int64 \(experts,\)"),
        (layer_file(token_count=torch.tensor(1)), format_, r"count is I64 \(\), expected int64 \(experts,\)"),
        (layer_file(num_tokens=torch.tensor([1, 2])), format_, r"0.num_tokens is I64 \(2,\), expected int64 \(1,\)"),
        (layer_file(num_tokens=torch.tensor([-1])), format_, "layer 0: num_tokens is -1"),
        (layer_file(token_count=torch.tensor([-3])), format_, "layer 0: token_count of expert 0 is -3"),
        ({"layers.0.norm_sum": wide(1)}, format_, "unknown tensor layers.0.norm_sum"),
        (layer_file(output_sum=wide(1, 2)), {"format": "secateur-stats/2"}, "unknown tensor layers.0.output_sum"),
        (layer_file(output=wide(1, 2)), shaped, "unknown tensor layers.0.output"),
        (layer_file(output_sum=torch.ones(1, 2)), shaped, r"0.output_sum is F32 \(1, 2\), expected float64 \(1, D\)"),
        (layer_file(output_sum=wide(2, 2)), shaped, r"0.output_sum is F64 \(2, 2\), expected float64 \(1, D\)"),
        (
            layer_file(output_sum=wide(1, 2), input_gram=wide(3, 3)),
            shaped,
            r"0.input_gram is F64 \(3, 3\), expected float64 \(2, 2\)",
        ),
        (layer_file(output_square_sum=-wide(1, 2)), shaped, "layer 0: output_square_sum of expert 0, D 0 is -1.0"),
    ]
    for tensors, metadata, message in contents:
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with pytest.raises(SecateurError, match=rf"stats.safetensors: .*{message}"):
            RouterStats.load(path)


def layer_stats(seed: int = 0, num_experts: int = 4, names: Iterable[str] = SUMS) -> LayerStats:
    """A layer with these sums, all numbers random; the last expert was never routed to."""
    count = torch.randint(1, 9, (num_experts,), generator=torch.Generator().manual_seed(seed))
    count[-1] = 0
    return LayerStats(num_tokens=20, token_count=count, **random_sums(count, seed, names))


def full_stats(seed: int = 0, names: Iterable[str] = SUMS) -> RouterStats:
    return RouterStats(layers={1: layer_stats(seed, 4, names), 4: layer_stats(seed + 100, 3, names)})


def test_sums_add_and_maxima_merge_by_maximum() -> None:
    first, second = layer_stats(1), layer_stats(2)
    total = first + second
    assert list(total.sums) == list(SUMS)
    for name in SUMS:
        pairs = list(zip(first.sums[name].flatten().tolist(), second.sums[name].flatten().tolist(), strict=True))
        merge = max if name == "max_activation" else sum
        assert total.sums[name].flatten().tolist() == [merge(pair) for pair in pairs], name


def test_windows_with_every_sum_add_up_in_any_order_and_grouping() -> None:
    one, two, three = (full_stats(seed) for seed in range(3))  # of dyadic numbers, whose sums are exact
    assert (one + two) + three == (three + one) + two == one + (three + two)


def test_reordering_and_adding_commute() -> None:
    orders = {1: [3, 1, 0, 2], 4: [2, 0]}  # the second drops an expert
    one, two = full_stats(1), full_stats(2)
    assert (one + two).reordered(orders) == one.reordered(orders) + two.reordered(orders)


def test_both_axes_of_pairs_of_experts_are_reordered() -> None:
    pairs = torch.tensor([[5, 2, 0], [2, 4, 0], [0, 0, 0]], dtype=torch.float64)
    one = LayerStats(num_tokens=7, token_count=torch.tensor([5, 4, 0]), co_selection=pairs).reordered([2, 0, 1])
    assert one.sums["co_selection"].tolist() == [[0, 0, 0], [0, 5, 2], [0, 2, 4]]


def test_windows_of_other_widths_do_not_add_up() -> None:
    one, two = (LayerStats(num_tokens=1, token_count=torch.tensor([1]), output_sum=wide(1, width)) for width in (2, 3))
    with pytest.raises(SecateurError, match=r"do not add up: output_sum has the shapes \(1, 2\) and \(1, 3\)"):
        one + two


def test_windows_with_different_sums_do_not_add_up() -> None:
    with pytest.raises(SecateurError, match="layer 0: statistics do not add up: max_activation, norm_sum are in one"):
        RouterStats(layers={0: layer_stats(names=["weight_sum", "norm_sum", "max_activation"])}) + RouterStats(
            layers={0: layer_stats(names=["weight_sum"])}
        )


def test_layers_with_different_sums_are_refused() -> None:
    with pytest.raises(SecateurError, match="layer 1 has no sums, the first layer norm_sum"):
        RouterStats(layers={0: layer_stats(names=["norm_sum"]), 1: layer_stats(names=[])})


def test_sums_read_back_bit_by_bit(tmp_path: Path) -> None:
    stats = full_stats()
    stats.save(tmp_path / "stats.safetensors")
    other = RouterStats.load(tmp_path / "stats.safetensors")
    assert other == stats
    assert other.digest() == stats.digest()
    assert other.sums == tuple(SUMS)
    other.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "stats.safetensors").read_bytes()
    first = full_stats(names=DEFAULT_SUMS)
    assert RouterStats.from_json(first.to_json()) == first


def test_statistics_with_a_sum_on_request_have_no_json_form() -> None:
    with pytest.raises(SecateurError, match="output_sum, input_gram have no JSON form"):
        full_stats(names=["norm_sum", "output_sum", "input_gram"]).to_json()


def test_other_software_reads_a_file_with_every_sum(tmp_path: Path) -> None:
    full_stats().save(tmp_path / "stats.safetensors", {"model": None, "data": {"ä": 1}})
    found = safetensors.torch.load_file(tmp_path / "stats.safetensors")
    assert torch.equal(found["layers.4.neuron_gram"], full_stats().layers[4].sums["neuron_gram"])
    assert len(found) == 2 * (2 + len(SUMS))


def test_a_file_is_not_read_further_than_a_wrong_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.safetensors"
    path.write_bytes(safetensors.torch.save(layer_file(output_sum=wide(2, 2)), {"format": "secateur-stats/3"}))
    monkeypatch.setattr(numpy, "fromfile", lambda *args, **kwargs: pytest.fail("a tensor was read"))
    with pytest.raises(SecateurError, match="output_sum is F64"):
        RouterStats.load(path)


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    full_stats().save(tmp_path / "stats.safetensors")
    whole = (tmp_path / "stats.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "stats.safetensors").write_bytes(whole[:length])
        with pytest.raises(SecateurError, match=r"stats.safetensors: cannot be read"):
            RouterStats.load(tmp_path / "stats.safetensors")


def test_a_file_says_which_sums_it_has(tmp_path: Path) -> None:
    stats = RouterStats(layers={0: layer_stats(names=["weight_sum", "max_activation"])})
    stats.save(tmp_path / "stats.safetensors")
    assert RouterStats.load(tmp_path / "stats.safetensors").sums == ("weight_sum", "max_activation")
    assert RouterStats.from_loads(LOADS, 55).sums == ()


def test_counts_alone_are_still_written_as_version_1_and_sums_as_version_2(tmp_path: Path) -> None:
    for stats, version in (
        (RouterStats.from_loads(LOADS, 55), 1),
        (full_stats(names=VERSIONS[2]), 2),
        (full_stats(names=["output_sum"]), 3),
    ):
        stats.save(tmp_path / "stats.safetensors")
        with safetensors.safe_open(tmp_path / "stats.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": f"secateur-stats/{version}"}
        assert version == 3 or stats.to_json()["version"] == version


def test_the_digest_of_a_sum_on_request_is_that_of_its_bytes() -> None:
    stats = LayerStats(
        num_tokens=3, token_count=torch.tensor([2, 0]), output_sum=wide(2, 1) * torch.tensor([[0.5], [0]])
    )
    text = (
        b"secateur-stats/3\n"
        b"layers.7.num_tokens I64 [1]\n" + (3).to_bytes(8, "little") + b"layers.7.output_sum F64 [2, 1]\n"
        b"\0\0\0\0\0\0\xe0\x3f" + bytes(8) + b"layers.7.token_count I64 [2]\n" + (2).to_bytes(8, "little") + bytes(8)
    )
    assert RouterStats(layers={7: stats}).digest() == hashlib.sha256(text).hexdigest()


def test_reordering_moves_every_field_and_emptying_keeps_every_field() -> None:
    stats = full_stats()
    moved = stats.reordered({1: [2, 0, 3, 1]}).layers
    assert moved[4] == stats.layers[4]
    assert moved[1].token_count.tolist() == stats.layers[1].token_count[[2, 0, 3, 1]].tolist()
    for name in DEFAULT_SUMS:
        assert moved[1].sums[name].tolist() == stats.layers[1].sums[name][[2, 0, 3, 1]].tolist()
    empty = stats.emptied()
    assert stats + empty == stats
    assert empty.layers[1].token_count.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("names", [DEFAULT_SUMS, SUMS], ids=["by default", "every"])
def test_every_entry_of_every_sum_changes_the_digest(names: Iterable[str]) -> None:
    stats = full_stats(names=names)
    digests, entries = {stats.digest()}, 0
    for name in names:
        for place in stats.layers[1].sums[name].nonzero()[[0, -1]].tolist():
            value = stats.layers[1].sums[name].clone()
            value[tuple(place)] += 2.0**-10
            changed = {**stats.layers[1].sums, name: value}
            layer = LayerStats(num_tokens=20, token_count=stats.layers[1].token_count, **changed)
            digests.add(RouterStats(layers={**stats.layers, 1: layer}).digest())
            entries += 1
    assert len(digests) == 1 + entries


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm_sum", [1.0, float("nan"), 0.0], "norm_sum of expert 1 is nan"),
        ("weight_sum", [float("inf"), 1.0, 0.0], "weight_sum of expert 0 is inf, expected a finite number$"),
        ("max_activation", [1.0, -2.0, 0.0], "max_activation of expert 1 is -2.0, expected a finite number of 0 or"),
        ("norm_square_sum", [1.0, 2.0, 3.0], "norm_square_sum of expert 2 is 3.0, though no token reached it"),
        ("norm_sum", [1.0, 2.0], r"norm_sum is torch.float64 \(2,\), expected float64 \(3,\)"),
        ("norm_sum", [[1.0, 2.0, 0.0]], r"norm_sum is torch.float64 \(1, 3\), expected float64 \(3,\)"),
        ("output_sum", [1.0, 2.0, 0.0], r"output_sum is torch.float64 \(3,\), expected float64 \(3, D\)"),
        ("output_sum", [[], [], []], r"output_sum is torch.float64 \(3, 0\), expected float64 \(3, D\)"),
        ("output_sum", [[1, 0], [0, float("inf")], [0, 0]], "of expert 1, D 1 is inf, expected a finite number$"),
        ("output_square_sum", [[1, 0], [0, -1], [0, 0]], "of expert 1, D 1 is -1.0, expected a finite number of 0 or"),
        ("output_sum", [[1, 0], [0, 1], [0, -1]], "output_sum of expert 2, D 1 is -1.0, though no token reached it"),
        (
            "co_selection",
            [[1, 0, 0], [0, 1, 3], [0, 0, 0]],
            "of expert 1, expert 2 is 3.0, though no token reached expert 2",
        ),
        (
            "co_selection",
            [[1, 0, 0], [0, 1, 0], [0, 2, 0]],
            "of expert 2, expert 1 is 2.0, though no token reached expert 2",
        ),
        ("co_selection", [[1.0, 2.0]] * 3, r"co_selection is torch.float64 \(3, 2\), expected float64 \(3, 3\)"),
        ("input_gram", [[1.0, 2.0]] * 3, r"input_gram is torch.float64 \(3, 2\), expected float64 \(D, D\)"),
        (
            "neuron_gram",
            [[[1.0]], [[1.0]], [[1.0]]],
            "neuron_gram of expert 2, F 0, F 0 is 1.0, though no token reached it",
        ),
    ],
)
def test_impossible_sums_are_refused_by_field_and_expert(name: str, value: list[Any], message: str) -> None:
    count = torch.tensor([4, 2, 0])
    with pytest.raises(SecateurError, match=message):
        LayerStats(num_tokens=3, token_count=count, **{name: torch.tensor(value, dtype=torch.float64)})


def test_gates_may_be_negative_and_sums_must_be_float64() -> None:
    count = torch.tensor([1, 1])
    LayerStats(num_tokens=1, token_count=count, weight_sum=torch.tensor([-1.0, 1.0], dtype=torch.float64))
    with pytest.raises(SecateurError, match=r"norm_sum is torch.float32 \(2,\)"):
        LayerStats(num_tokens=1, token_count=count, norm_sum=torch.ones(2))
    with pytest.raises(SecateurError, match=r"norm_sum is \[1.0, 1.0\]"):
        LayerStats(num_tokens=1, token_count=count, norm_sum=[1.0, 1.0])  # type: ignore[arg-type]


def test_sums_do_not_follow_the_accumulator_they_were_made_from() -> None:
    total = torch.ones(2, dtype=torch.float64)
    stats = LayerStats(num_tokens=1, token_count=torch.tensor([1, 1]), norm_sum=total)
    total.zero_()
    assert stats.sums["norm_sum"].tolist() == [1.0, 1.0]


def test_the_widths_of_the_sums_of_a_layer_are_the_same() -> None:
    with pytest.raises(SecateurError, match=r"output_square_sum is torch.float64 \(1, 3\), expected float64 \(1, 2\)"):
        LayerStats(num_tokens=1, token_count=torch.tensor([1]), output_sum=wide(1, 2), output_square_sum=wide(1, 3))


def test_every_sum_is_a_keyword_and_an_attribute_and_no_other_name_is() -> None:
    layer = layer_stats()
    for name in SUMS:
        assert getattr(layer, name) is layer.sums[name]
        assert getattr(layer_stats(names=[]), name) is None
    with pytest.raises(TypeError, match="LayerStats has no sum norms; SUMS has weight_sum"):
        LayerStats(num_tokens=1, token_count=torch.tensor([1]), norms=wide(1))
    with pytest.raises(AttributeError, match="no attribute 'norms'"):
        layer.norms  # noqa: B018
    assert copy.deepcopy(layer) == pickle.loads(pickle.dumps(layer)) == layer  # noqa: S301 - our own


def test_the_order_of_sums_is_that_of_the_table_however_they_are_given() -> None:
    names = list(SUMS)
    assert list(layer_stats(names=reversed(names)).sums) == names


def test_sums_are_asked_for_by_name() -> None:
    assert recorded() == DEFAULT_SUMS == VERSIONS[2]
    assert recorded(["input_gram", "output_sum", "norm_sum"]) == (*DEFAULT_SUMS, "output_sum", "input_gram")
    with pytest.raises(SecateurError, match=r"sum 'outputs': expected one of weight_sum, .*neuron_gram"):
        recorded(["outputs"])


# --- what the rows of the table measure ---------------------------------------------------------------------------


def test_the_sums_of_the_toy_are_those_worked_out_by_hand() -> None:
    sums = TOY.stats().sums
    expected = {
        "weight_sum": [13 / 9, 10 / 9, 4 / 9],
        "norm_sum": [7, 6, 10],
        "norm_square_sum": [29, 14, 100],
        "weighted_norm_sum": [44 / 9, 19 / 9, 40 / 9],
        "max_activation": [4, 3, 8],  # absolute: the signed maximum of expert 2 is 2
        "output_sum": [[3, 6], [-2, 2], [8, 6]],
        "output_square_sum": [[9, 20], [10, 4], [64, 36]],
        # x is (3, 0), (1, 1), (0, 4)
        "input_square_sum": [[4, (28 / 9) ** 2], [1 + 25 / 81, 25 / 81 + 64 / 81], [16 / 81, 16 / 81]],
        # a is (1, 2, 0), (0, 1, 3); (2, 0, 1), (1, 1, 0), (0, 0, 2); (1, 0, 4)
        "neuron_square_sum": [
            [4 / 9, 16 / 9 + 49 / 81, 49 / 9],
            [4 / 9 + 25 / 81, 25 / 81, 1 / 9 + 16 / 81],
            [16 / 81, 0, 256 / 81],
        ],
        "co_selection": [[2, 2, 0], [2, 3, 1], [0, 1, 1]],
        "input_gram": [[10, 1], [1, 17]],
        "neuron_gram": [
            [[1, 2, 0], [2, 5, 3], [0, 3, 9]],
            [[5, 1, 2], [1, 1, 0], [2, 0, 5]],
            [[1, 0, 4], [0, 0, 0], [4, 0, 16]],
        ],
    }
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=0), name


@pytest.mark.parametrize("name", SUMS)
def test_one_call_and_three_and_three_observers_give_the_same(name: str) -> None:
    """To 1e-12, since rounding depends on the grouping; bit for bit where all numbers are small and dyadic."""
    layer = random_layer(5)
    exact = Layer(**{part: (value * 8).round() / 8 for part, value in vars(layer).items()})
    for one, is_exact in ((layer, False), (exact, True)):
        whole, three = one.stats(), one.stats(parts=3)
        parts = [one.of_tokens(part).stats() for part in torch.arange(40).tensor_split(3)]
        for other in (three, parts[0] + parts[1] + parts[2]):
            assert other.token_count.tolist() == whole.token_count.tolist()
            tolerance = 0 if is_exact and not name.endswith(("norm_sum", "norm_square_sum")) else 1e-12  # square roots
            torch.testing.assert_close(other.sums[name], whole.sums[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SUMS)
def test_padding_adds_nothing_even_where_it_is_not_a_number(name: str) -> None:
    layer = random_layer(6)
    keep = torch.arange(40) % 3 > 0
    expected = layer.of_tokens(keep).stats()
    values = {part: getattr(layer, part).clone() for part in ("outputs", "neurons", "inputs")}
    values["outputs"][:, ~keep] = values["neurons"][:, ~keep] = values["inputs"][~keep] = float("nan")
    found = dataclasses.replace(layer, **values).stats(keep=keep)
    assert found.num_tokens == expected.num_tokens == int(keep.sum())
    torch.testing.assert_close(found.sums[name], expected.sums[name], rtol=1e-12, atol=1e-12)


def test_equal_statistics_have_equal_digests_where_a_zero_is_below_0() -> None:
    found = [
        RouterStats(
            layers={
                0: LayerStats(
                    num_tokens=1,
                    token_count=torch.tensor([1]),
                    output_sum=torch.tensor([[zero, 1.0]], dtype=torch.float64),
                )
            }
        )
        for zero in (0.0, -0.0)
    ]
    assert found[0] == found[1]
    assert found[0].digest() == found[1].digest()
