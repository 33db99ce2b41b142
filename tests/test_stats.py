"""Statistics are sums: they add up exactly, survive a file, and refuse what is not a count."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from secateur.errors import SecateurError
from secateur.stats import SUMS, LayerStats, RouterStats

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


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    with pytest.raises(SecateurError, match=r"stats.safetensors: cannot be read"):
        RouterStats.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(SecateurError, match=r"stats.safetensors: cannot be read"):
        RouterStats.load(path)
    format_ = {"format": "secateur-stats/1"}
    contents = [
        ({"weight": torch.ones(2)}, {}, "format is None"),
        ({"weight": torch.ones(2)}, format_, "unknown tensor weight"),
        ({"layers.0.token_count": torch.tensor([1])}, format_, "'layers.0.num_tokens' is missing"),
        (
            {"layers.0.token_count": torch.ones(1), "layers.0.num_tokens": torch.tensor([1])},
            format_,
            r"count\[0\]' is 1.0",
        ),
        (
            {"layers.0.token_count": torch.tensor([1]), "layers.0.num_tokens": torch.tensor([1, 2])},
            format_,
            r"'layers.0.num_tokens' is \[1, 2\], expected a whole number",
        ),
        ({"layers.0.norm_sum": torch.ones(1, dtype=torch.float64)}, format_, "unknown tensor layers.0.norm_sum"),
    ]
    for tensors, metadata, message in contents:
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with pytest.raises(SecateurError, match=rf"stats.safetensors: .*{message}"):
            RouterStats.load(path)


def layer_stats(seed: int = 0, num_experts: int = 4, names: Iterable[str] = SUMS) -> LayerStats:
    """A layer with these sums, all numbers random; the last expert was never routed to."""
    rng = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 9, (num_experts,), generator=rng)
    count[-1] = 0
    sums = {name: torch.rand(num_experts, generator=rng, dtype=torch.float64) for name in names}
    return LayerStats(num_tokens=20, token_count=count, **{name: value * (count > 0) for name, value in sums.items()})


def full_stats(seed: int = 0) -> RouterStats:
    return RouterStats(layers={1: layer_stats(seed), 4: layer_stats(seed + 100, num_experts=3)})


def test_sums_add_and_maxima_merge_by_maximum() -> None:
    first, second = layer_stats(1), layer_stats(2)
    total = first + second
    assert list(total.sums) == list(SUMS)
    for name in SUMS:
        pairs = list(zip(first.sums[name].tolist(), second.sums[name].tolist(), strict=True))
        merge = max if name == "max_activation" else sum
        assert total.sums[name].tolist() == [merge(pair) for pair in pairs], name


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
    for other in (RouterStats.load(tmp_path / "stats.safetensors"), RouterStats.from_json(stats.to_json())):
        assert other == stats
        assert other.digest() == stats.digest()
        for layer, one in stats.layers.items():
            assert all(torch.equal(other.layers[layer].sums[name], value) for name, value in one.sums.items())


def test_a_file_says_which_sums_it_has(tmp_path: Path) -> None:
    stats = RouterStats(layers={0: layer_stats(names=["weight_sum", "max_activation"])})
    stats.save(tmp_path / "stats.safetensors")
    assert RouterStats.load(tmp_path / "stats.safetensors").sums == ("weight_sum", "max_activation")
    assert RouterStats.from_loads(LOADS, 55).sums == ()


def test_counts_alone_are_still_written_as_version_1_and_sums_as_version_2(tmp_path: Path) -> None:
    for stats, version in ((RouterStats.from_loads(LOADS, 55), 1), (full_stats(), 2)):
        stats.save(tmp_path / "stats.safetensors")
        with safetensors.safe_open(tmp_path / "stats.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": f"secateur-stats/{version}"}
        assert stats.to_json()["version"] == version


def test_reordering_moves_every_field_and_emptying_keeps_every_field() -> None:
    stats = full_stats()
    moved = stats.reordered({1: [2, 0, 3, 1]}).layers
    assert moved[4] == stats.layers[4]
    assert moved[1].token_count.tolist() == stats.layers[1].token_count[[2, 0, 3, 1]].tolist()
    for name, value in stats.layers[1].sums.items():
        assert moved[1].sums[name].tolist() == value[[2, 0, 3, 1]].tolist()
    empty = stats.emptied()
    assert stats + empty == stats
    assert empty.layers[1].token_count.tolist() == [0, 0, 0, 0]


def test_every_sum_changes_the_digest() -> None:
    stats = full_stats()
    digests = {stats.digest()}
    for name in SUMS:
        changed = {**stats.layers[1].sums, name: stats.layers[1].sums[name] * 2}
        layer = LayerStats(num_tokens=20, token_count=stats.layers[1].token_count, **changed)
        digests.add(RouterStats(layers={**stats.layers, 1: layer}).digest())
    assert len(digests) == 1 + len(SUMS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm_sum", [1.0, float("nan"), 0.0], "norm_sum of expert 1 is nan"),
        ("weight_sum", [float("inf"), 1.0, 0.0], "weight_sum of expert 0 is inf, expected a finite number$"),
        ("max_activation", [1.0, -2.0, 0.0], "max_activation of expert 1 is -2.0, expected a finite number of 0 or"),
        ("norm_square_sum", [1.0, 2.0, 3.0], "norm_square_sum of expert 2 is 3.0, though no token reached it"),
        ("norm_sum", [1.0, 2.0], r"norm_sum is torch.float64 \(2,\), expected float64 \(3,\)"),
    ],
)
def test_impossible_sums_are_refused_by_field_and_expert(name: str, value: list[float], message: str) -> None:
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
