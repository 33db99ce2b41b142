"""Checkpoints in the V-MoE authors' layout: what is read is what was written, and computes what flax would."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import SecateurError
from secateur.models.vmoe.flax_checkpoint import read_vmoe
from secateur.models.vmoe.flax_files import read_arrays
from support.flax_files import CHUNKS_KEY, array, info, packed, params, random_arrays, slices, write
from support.model_folders import contents

ROUTER = "Encoder/encoderblock_1/Moe/Router/dense/kernel"


def flax_logits(arrays: dict[str, Tensor], images: Tensor, top_k: int, members: int = 1) -> Tensor:
    """(B * members, classes), with the axes as flax has them; without a limit of places. images: (B, H, W, C)."""

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (8,), arrays[f"{name}/scale"], arrays[f"{name}/bias"], eps=1e-6)

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]

    def mlp(name: str, x: Tensor) -> Tensor:
        return dense(f"{name}/Dense_1", functional.gelu(dense(f"{name}/Dense_0", x), approximate="tanh"))

    def attention(name: str, x: Tensor) -> Tensor:
        def heads(part: str) -> Tensor:
            kernel, bias = arrays[f"{name}/{part}/kernel"], arrays[f"{name}/{part}/bias"]
            return torch.einsum("btd,dhk->bthk", x, kernel) + bias

        weights = torch.einsum("bqhk,bthk->bhqt", heads("query"), heads("key")) / math.sqrt(4)
        mixed = torch.einsum("bhqt,bthk->bqhk", weights.softmax(-1), heads("value"))
        return torch.einsum("bqhk,hkd->bqd", mixed, arrays[f"{name}/out/kernel"]) + arrays[f"{name}/out/bias"]

    def experts(name: str, x: Tensor) -> Tensor:
        kernel = arrays[f"{name}/Router/dense/kernel"]
        every = torch.stack([one_expert(f"{name}/Mlp", expert, x) for expert in range(4)])
        result = torch.zeros_like(x)
        for row in range(len(x)):
            member = row % members
            own = kernel if members == 1 else kernel[:, member]
            for token in range(x.shape[1]):
                gates = (x[row, token] @ own).softmax(-1)
                for expert in gates.topk(top_k).indices.tolist():
                    result[row, token] += gates[expert] * every[member * own.shape[1] + expert, row, token]
        return result

    def one_expert(name: str, expert: int, x: Tensor) -> Tensor:
        inner = x @ arrays[f"{name}/Dense_0/kernel"][expert] + arrays[f"{name}/Dense_0/bias"][expert]
        inner = functional.gelu(inner, approximate="tanh")
        return inner @ arrays[f"{name}/Dense_1/kernel"][expert] + arrays[f"{name}/Dense_1/bias"][expert]

    patches = images.reshape(-1, 2, 2, 2, 2, 3).transpose(2, 3)  # (B, row, column, height, width, channels)
    x = torch.einsum("bijhwc,hwcd->bijd", patches, arrays["embedding/kernel"]) + arrays["embedding/bias"]
    x = x.flatten(1, 2)
    if "cls" in arrays:
        x = torch.cat((arrays["cls"].expand(len(x), 1, 8), x), dim=1)
    x = x + arrays["Encoder/posembed_input/pos_embedding"]
    for block in (0, 1):
        name = f"Encoder/encoderblock_{block}"
        x = x.repeat_interleave(members, dim=0) if block else x
        x = x + attention(f"{name}/SelfAttention", norm(f"{name}/LayerNorm_0", x))
        layer: Callable[[str, Tensor], Tensor] = experts if block else mlp
        x = x + layer(f"{name}/{'Moe' if block else 'Mlp'}", norm(f"{name}/LayerNorm_1", x))
    x = norm("Encoder/encoder_norm", x)
    x = x[:, 0] if "cls" in arrays else x.mean(dim=1)
    return dense("head", dense("pre_logits", x).tanh())


@pytest.mark.parametrize(("members", "top_k", "token"), [(1, 2, True), (1, 1, False), (2, 1, True)])
def test_the_model_computes_what_the_checkpoint_computes(members: int, top_k: int, token: bool, tmp_path: Path) -> None:
    arrays = random_arrays(members=members, token=token)
    prefix = write(tmp_path / "vmoe", params(arrays), num_files=3)
    model = read_vmoe(prefix, num_experts_per_tok=top_k, eval_capacity_factor=None)
    images = torch.randn(3, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(images.permute(0, 3, 1, 2))
    logits = found.logits if members == 1 else found.member_logits.flatten(0, 1)
    torch.testing.assert_close(logits, flax_logits(arrays, images, top_k, members), atol=1e-5, rtol=1e-5)


def test_parameters_alone_are_read_as_those_of_a_training_state(tmp_path: Path) -> None:
    """What was published is no training state."""
    arrays = random_arrays()
    found = read_arrays(write(tmp_path / "published", arrays), "params")
    assert found.keys() == arrays.keys()
    assert all(torch.equal(found[name], value) for name, value in arrays.items())


def test_members_that_the_routers_do_not_tell_are_given(tmp_path: Path) -> None:
    """A pre-trained model is no ensemble yet: its experts become blocks of the members."""
    arrays = random_arrays(members=2)
    flat = arrays | {ROUTER: arrays[ROUTER].reshape(8, 4)}
    told, given = (write(tmp_path / name, params(one)) for name, one in (("told", arrays), ("flat", flat)))
    model = read_vmoe(given, num_experts_per_tok=1, members=2)
    assert model.config.ensemble_size == 2
    expected = read_vmoe(told, num_experts_per_tok=1, members=2).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(SecateurError, match="2 members, but 4 are asked for"):
        read_vmoe(told, num_experts_per_tok=1, members=4)
    with pytest.raises(SecateurError, match="4 experts, expected a multiple of the 3 members"):
        read_vmoe(given, num_experts_per_tok=1, members=3)


@pytest.mark.parametrize("num_files", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_arrays_come_back_byte_for_byte(num_files: int, dtype: torch.dtype, tmp_path: Path) -> None:
    arrays = {name: value.to(dtype) for name, value in random_arrays().items()} | {
        "number": torch.tensor(2.5, dtype=dtype)
    }
    found = read_arrays(write(tmp_path / "x", params(arrays), num_files=num_files, piece=7), "params")
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value), name


def test_the_command_makes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    arrays = random_arrays(members=2)
    write(tmp_path / "e3", params(arrays))
    words = ["convert-vmoe", str(tmp_path / "e3.index"), "--top-k", "1", "--out", str(tmp_path / "out")]
    words += ["--capacity-factor", "1.5", "--group-images", "4"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "4 experts in 1 of 2 blocks, 2 members" in result.stdout.replace("\n", " ")
    model, problems = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values()), problems
    assert torch.equal(model.classifier.bias, arrays["head/bias"])
    config = model.config
    assert (config.num_experts_per_tok, config.ensemble_size, config.group_images) == (1, 2, 4)
    assert (config.capacity_factor, config.eval_capacity_factor) == (1.5, 1.5)
    before = contents(tmp_path / "out")
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "it was there already, as this command writes it" in again.stdout.replace("\n", " ")
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(before["model.safetensors"][:-1] + b"\0")
    with pytest.raises(SecateurError, match=r"it is there already .* its files are others"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    weights.write_bytes(before["model.safetensors"])
    with pytest.raises(SecateurError, match="it is there already"):
        CliRunner().invoke(app, [*words, "--group-images", "8"], catch_exceptions=False)
    (tmp_path / "out/preprocessor_config.json").unlink()  # so it is not looked at further
    with pytest.raises(SecateurError, match=r"it is there already and not an empty folder$"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert sorted(path.name for path in tmp_path.iterdir() if "e3" not in path.name) == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls": None}, "5 patches of 2 x 2 pixels, expected a square"),
        ({"head/bias": None}, "head/bias: no such array, expected an array of 1 axes"),
        ({"head/kernel": None}, "classifier.weight is missing"),
        ({"head/kernel": torch.zeros(5, 6)}, r"classifier.weight is \(6, 5\), expected \(5, 6\)"),
        ({"extra": torch.zeros(2)}, r"extra of shape \(2,\) is no array of a V-MoE"),
        ({"embedding/kernel": torch.zeros(2, 3, 3, 8)}, "patches of 2 x 3 pixels"),
        ({"Encoder/encoderblock_1/Moe/Router/dense/kernel": None}, "no block has Moe/Router/dense/kernel"),
        ({"Encoder/encoderblock_1/Moe/Router/dense/kernel": torch.zeros(8, 3, 1)}, "multiple of ensemble_size 3"),
        ({"Encoder/encoderblock_7/Mlp/Dense_0/bias": torch.zeros(12)}, "vmoe.layers.7.mlp.fc1.bias is not expected"),
    ],
)
def test_another_model_is_refused_by_name(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    arrays = {name: value for name, value in (random_arrays() | change).items() if value is not None}
    prefix = write(tmp_path / "x", params(arrays))
    with pytest.raises(SecateurError, match=rf"x\.index: .*{message}"):
        read_vmoe(prefix, num_experts_per_tok=2)


ONE = {"params/a": torch.arange(6.0).view(2, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": {"version": "20210101"}}, "version '20210101', expected '20220622'"),
        ({"index": {"version": None}}, "version None"),
        ({"index": {"shard_count": 0}}, "shard_count 0, expected 1 to 10000"),
        ({"index": {"shard_count": True}}, "shard_count True"),
        ({"index": {"shard_count": 3}}, r"files \['x.data-00000-of-00003'"),
        ({"index": {"index": [1]}}, "a tree of names"),
        ({"index": {"index": {"params": 3}}}, "params is a int"),
        ({"index": {"index": {"params": {}}}}, "it names no array"),
        ({"index": {"index": {"params": {"a": b"\xc1"}}}}, "params/a: damaged"),
        ({"info": {"shape": [2, 2**40]}}, "but there are 164 in the files x.data"),
        ({"info": {"shape": [2, -3]}}, r"shape \[2, -3\], expected at most 8 numbers above 0"),
        ({"info": {"shape": [2, 0]}}, r"shape \[2, 0\]"),
        ({"info": {"shape": [1] * 9}}, "expected at most 8"),
        (
            {"info": {"shape": [2, 2]}},
            r"\.data-\S+: a of x\.index: slices \(\(0, 1\), \(0, 3\)\), expected some inside the shape \(2, 2\)",
        ),
        ({"info": {"shape": [6]}}, "expected some inside the shape"),
        (
            {"info": {"shape": [3, 3]}},
            r"x\.index: parts of \['a'\] are in none of the data files \(x\.data-00000-of-00002, x\.data-00001-of-",
        ),
        ({"info": {"dtype": "object"}}, "params/a is of type 'object'|a is of type 'object'"),
        ({"info": {"dtype": "bfloat16"}}, "expected bfloat16"),
        ({"info": {"files": [0, 2]}}, r"files \[0, 2\], expected one for each slice, 0 to 1"),
        ({"info": {"files": [0]}}, r"files \[0\]"),
    ],
)
def test_a_damaged_index_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", ONE, **changes)
    with pytest.raises(SecateurError, match=message):
        read_arrays(prefix, "params")


def chunk(box: list[tuple[int, ...]], *values: Tensor) -> dict[str, Any]:
    return {CHUNKS_KEY: True, "0": [[[array(value) for value in values], msgpack.ExtType(6, slices(box))]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.index: arrays of 24 bytes, but there are 0 in the files x\.data-00000-of-00001$"),
        (b"\xc1" * 50, "no msgpack, or damaged"),
        (b"\xdd\xff\xff\xff\xff" + b"\0" * 50, "no msgpack, or damaged"),
        (b"\x91" * 5000, "no msgpack, or damaged"),
        (packed([1] * 50), "a list, expected a map"),
        (packed({str(number): [] for number in range(50)}), "expected chunks of arrays"),
        (packed({CHUNKS_KEY: True, "0": 3}), "array 0 is a int, expected a list of pieces"),
        (packed({CHUNKS_KEY: True, "0": [[1, 2]]}), "array 0 is damaged"),
        (packed({CHUNKS_KEY: True}), r"parts of \['a'\] are in none"),
        (packed(chunk([(0, 2), (0, 3)], torch.zeros(5))), r"20 bytes for a part of shape \[2, 3\]"),
        (packed(chunk([(0, 2), (0, 3)], torch.zeros(3), torch.zeros(3).half())), "pieces of type"),
        (packed(chunk([(0, 2), (1, 4)], torch.zeros(6))), r"expected some inside the shape \(2, 3\)"),
        (packed(chunk([(0, 6)], torch.zeros(6))), "expected some inside the shape"),
        (packed(chunk([(0, 1), (0, 3)], torch.zeros(3))), r"parts of \['a'\] are in none"),
        (packed(chunk([(1, 0), (0, 3)], torch.zeros(3))), r"slice \(1, 0, None\)"),
        (packed(chunk([(0, 2, 2), (0, 3)], torch.zeros(6))), r"slice \(0, 2, 2\), expected 0 <= start < stop"),
        (packed(chunk([(-1, 1), (0, 3)], torch.zeros(6))), r"slice \(-1, 1, None\)"),
        (packed({CHUNKS_KEY: True, "0": [[[msgpack.ExtType(1, b"\xc1")], msgpack.ExtType(6, b"\x90")]]}), "damaged"),
        (packed({CHUNKS_KEY: True, "0": chunk([(0, 2), (0, 3)], torch.zeros(6))["0"] * 2}), "are there twice"),
    ],
)
def test_a_damaged_data_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    # The index has one file, so that the damaged one must be read.
    whole = [[(0, 2), (0, 3)]]
    index = {"shard_count": 1, "version": "20220622", "index": {"params": {"a": info(ONE["params/a"], whole, [0])}}}
    (tmp_path / "x.index").write_bytes(packed(index))
    (tmp_path / "x.data-00000-of-00001").write_bytes(content)
    with pytest.raises(SecateurError, match=message):
        read_arrays(tmp_path / "x", "params")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"nothing\.index: no such file"):
        read_arrays(tmp_path / "nothing", "params")
