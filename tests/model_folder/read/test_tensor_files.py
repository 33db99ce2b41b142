"""The reader of model folders trusts nothing: whatever is damaged is a SecateurError, and nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from secateur.errors import SecateurError
from secateur.files.safetensors_header import read_header
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.read.names import split
from secateur.model_folder.read.tensor_files import holds_model, read_tensor_files
from support.model_folders import INDEX, config_of, write

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NAMES = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(4)] + ["model.norm.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {name: torch.rand(3, 4) for name in NAMES}
    return write(tmp_path_factory.mktemp("good") / "model", config_of("mixtral"), tensors)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        read_tensor_files(folder)


def reindexed(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | changes))


def listed(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_good_folder_is_read_with_every_place(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "original").mkdir()
    (folder / "original/consolidated.00.pth").write_bytes(b"never opened")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").touch()
    found = read_tensor_files(folder)
    assert set(found.tensors) == set(NAMES)
    assert found.num_bytes == len(NAMES) * 3 * 4 * 4
    for tensor in found.tensors.values():
        assert (folder / tensor.file).stat().st_size >= tensor.start + tensor.length
    assert [str(path) for path in found.others] == ["tokenizer.json"]
    assert [str(path) for path in found.left_out] == ["original/consolidated.00.pth"]
    assert holds_model(folder)


def test_files_may_be_links_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / FIRST, tmp_path / "blob")
    (folder / FIRST).symlink_to(tmp_path / "blob")
    assert set(read_tensor_files(folder).tensors) == set(NAMES)


def test_a_missing_or_truncated_file_is_refused(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    for end, message in (
        (len(data) - 1, "truncated or damaged"),
        (40, "of its header"),
        (3, "3 of 8 bytes"),
        (0, "0 of 8"),
    ):
        (folder / SECOND).write_bytes(data[:end])
        refused(folder, message)
    (folder / SECOND).write_bytes(data + b"x")
    refused(folder, "truncated or damaged")
    (folder / SECOND).unlink()
    refused(folder, f"the file {SECOND}, named in {INDEX}, is missing")
    (folder / INDEX).unlink()
    refused(folder, f"{FIRST} but no {INDEX}")


def test_an_index_that_disagrees_with_the_files_is_refused(folder: Path) -> None:
    good = listed(folder)
    swapped = good | {NAMES[0]: SECOND}
    reindexed(folder, weight_map=swapped)
    refused(folder, f"'{NAMES[0]}' is in {SECOND} by {INDEX}, but was found in {FIRST}")
    reindexed(folder, weight_map={name: file for name, file in good.items() if name != NAMES[1]})
    refused(folder, f"'{NAMES[1]}' is in no file by {INDEX}, but was found in {SECOND}")
    reindexed(folder, weight_map=good | {"more": FIRST})
    refused(folder, f"'more' is in {FIRST} by {INDEX}, but was found in none")
    reindexed(folder, weight_map=dict.fromkeys(good, FIRST))
    refused(folder, f"{SECOND} is not in {INDEX}")
    for nothing in ({}, [], None, "x"):
        reindexed(folder, weight_map=nothing)
        refused(folder, "weight_map is")


ELSEWHERE = [
    "../outside.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "\0.safetensors",
    "\n.safetensors",
    "x.bin",
    3,
    None,
]


@pytest.mark.parametrize("path", ELSEWHERE)
def test_an_index_that_leads_elsewhere_is_refused(path: Any, folder: Path) -> None:
    save_file({"outside": torch.rand(2)}, folder.parent / "outside.safetensors")
    reindexed(folder, weight_map=listed(folder) | {"outside": path})
    refused(folder, "expected a file beside the index")


def test_a_tensor_that_is_there_twice_is_refused(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})[:-1]
    text = (header + "," + header[1:] + "}").encode()
    (folder / FIRST).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, "its header: an object lists a key twice: 'a'")
    save_file({name: torch.rand(3, 4) for name in NAMES}, folder / FIRST)
    refused(folder, f"the tensor .* is in {FIRST} and in {SECOND}")


def test_two_models_or_none_in_one_folder_are_refused(folder: Path) -> None:
    save_file({"a": torch.rand(2)}, folder / "model.safetensors")
    refused(folder, f"model.safetensors is not in {INDEX}")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refused(folder, "found pytorch_model.bin, and pickled files are never opened")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, f"expected {INDEX} or model.safetensors; found")
    save_file({}, folder / "model.safetensors")
    refused(folder, "hold no tensor")
    (folder / "config.json").unlink()
    refused(folder, r"config.json: the file is missing")
    refused(folder / "nowhere", "not a folder")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": 1, "a": 2}', "[" * 100_000, "\ud800"])
def test_json_that_is_none_is_refused(text: str, folder: Path) -> None:
    for name in ("config.json", INDEX):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(text.encode("utf-8", errors="surrogatepass"))
        refused(folder, f"{name}: (not JSON|found|an object lists a key twice)")
        (folder / name).write_bytes(before)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "no JSON object"),
        ({"__metadata__": []}, "not an object of texts"),
        ({"__metadata__": {"a": 1}}, "not an object of texts"),
        ({"a": []}, "expected dtype, shape and data_offsets"),
        ({"a": ENTRY | {"more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": ENTRY | {"dtype": "F33"}}, "dtype 'F33', expected one of"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "dtype .*expected one of"),
        ({"a": ENTRY | {"shape": [3]}}, "8 bytes for shape"),
        ({"a": ENTRY | {"shape": [-2]}}, "expected a list of whole numbers"),
        ({"a": ENTRY | {"shape": [2.0]}}, "expected a list of whole numbers"),
        ({"a": ENTRY | {"shape": [True]}}, "expected a list of whole numbers"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "-8 bytes for shape"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 8]}}, "0 bytes for shape"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "begins at byte .*, expected"),
        ({"a": ENTRY, "b": ENTRY}, "'b' begins at byte"),
        ({"\ud800": ENTRY}, "its header: not JSON in UTF-8"),
    ],
)
def test_a_header_with_a_fault_is_refused(header: Any, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(SecateurError, match=f"not a whole safetensors file .*{message}"):
        read_header(path)


def test_types_narrower_than_a_byte_are_read(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(3))
    assert read_header(tmp_path / "x.safetensors").entries["a"].length == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fuzzed = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def reads_or_refuses(folder: Path) -> None:
    with contextlib.suppress(SecateurError):
        read_model_folder(folder)


@pytest.mark.slow
@fuzzed
@given(st.data())
def test_a_header_with_any_change_is_read_or_refused(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model", dirs_exist_ok=True))
    raw = (folder / FIRST).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(json_values)
    elif isinstance(header[name], dict) and data.draw(st.booleans()):
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(json_values)
    else:
        header[data.draw(st.text(max_size=20))] = header.pop(name)
    text = json.dumps(header).encode()
    (folder / FIRST).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    reads_or_refuses(folder)


@fuzzed
@given(place=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 900))
def test_a_file_with_any_byte_changed_is_read_or_refused(
    good: Path, tmp_path: Path, place: int, byte: int, cut: int | None
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model", dirs_exist_ok=True))
    raw = bytearray((folder / FIRST).read_bytes())
    raw[place % len(raw)] = byte
    (folder / FIRST).write_bytes(raw[:cut])
    reads_or_refuses(folder)


@fuzzed
@given(index=json_values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from(NAMES), json_values)}))
def test_any_index_is_read_or_refused(good: Path, tmp_path: Path, index: Any) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model", dirs_exist_ok=True))
    (folder / INDEX).write_text(json.dumps(index))
    reads_or_refuses(folder)


@fuzzed
@given(st.data())
def test_any_config_is_read_or_refused(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model", dirs_exist_ok=True))
    config = json.loads((folder / "config.json").read_text())
    small = (
        st.none()
        | st.booleans()
        | st.integers(-3, 40)
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(0, 9))
    )
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        config[key] = data.draw(small)
    (folder / "config.json").write_text(json.dumps(config))
    reads_or_refuses(folder)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.mlp.gate.weight", ("model", "layers", 3, "mlp.gate.weight")),
        ("layers.0.x", ("", "layers", 0, "x")),
        ("a.b.layers.12.experts.4.w1", ("a.b", "layers", 12, "experts.4.w1")),
        ("lm_head.weight", None),
        ("0.weight", None),
        ("model.layers.3", None),
        ("layers.03.weight", None),
        ("layers.1234567.weight", None),
        ("layers.².weight", None),
    ],
)
def test_a_name_is_split_at_its_first_number(name: str, parts: Any) -> None:
    found = split(name)
    assert (None if found is None else (found.prefix, found.container, found.layer, found.rest)) == parts


@pytest.mark.parametrize(
    ("said", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"bits": 4}}, "unnamed"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": None, "compression_config": "by hand"}, "by hand"),
        ({"quantization_config": None}, None),
        ({}, None),
    ],
)
def test_a_folder_is_quantised_where_its_config_says_how(
    folder: Path, said: dict[str, Any], method: str | None
) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    files = read_tensor_files(folder)
    assert (files.quantisation, files.is_quantised) == (method, method is not None)
