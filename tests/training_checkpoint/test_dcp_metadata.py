"""`.metadata` is a pickle from somebody else: it is read, never run, and never trusted about where things are."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from secateur.errors import SecateurError
from secateur.training_checkpoint.apply import apply_to_checkpoint
from secateur.training_checkpoint.metadata import read_dcp
from secateur.training_checkpoint.stored import Chunk, StoredBytes, bytes_of, whole_tensor
from secateur.training_checkpoint.stubs import ALLOWED, Stub, read_stubs
from support.dcp_checkpoints import PLAN, save, tensors_of

TENSORS = {"w": torch.arange(12.0).reshape(4, 3), "scalar": torch.tensor(3), "bf16": torch.ones(5).bfloat16()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save({**TENSORS, "empty": torch.empty(0, 3), "nested": {"list": [1, {"text": "a"}]}}, tmp_path / "source")


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - written by this test
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def place(metadata: Metadata, name: str) -> tuple[MetadataIndex, _StorageInfo]:
    return next((index, info) for index, info in metadata.storage_data.items() if index.fqn == name)


def about(metadata: Metadata, name: str = "w") -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[name]
    assert isinstance(found, TensorStorageMetadata)
    return found


def test_it_says_what_torch_says(folder: Path) -> None:
    stored = read_dcp(folder)
    for name, value in TENSORS.items():
        assert (stored.tensors[name].shape, stored.tensors[name].dtype) == (tuple(value.shape), value.dtype)
    assert stored.tensors["empty"].shape == (0, 3)
    assert stored.blobs.keys() == {"nested.list.0", "nested.list.1.text"}
    assert stored.paths is not None
    assert stored.paths["nested.list.1.text"] == ("nested", "list", 1, "text")
    assert stored.files == {".metadata", "__0_0.distcp"}


class Runs:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["top", "planner_data", "storage_meta"])
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(folder: Path, where: str) -> None:
    trap = Runs(folder / "ran")
    if where == "top":
        (folder / ".metadata").write_bytes(pickle.dumps(trap))
    else:
        change(folder, lambda metadata: setattr(metadata, where, trap))
    with pytest.raises(SecateurError, match=r"\.metadata: its pickle names 'posix\.mkdir'"):
        read_dcp(folder)
    assert not (folder / "ran").exists()


def test_a_member_of_an_enumeration_as_some_pythons_pickle_it_is_described_and_not_looked_up() -> None:
    found = read_stubs(b"cbuiltins\ngetattr\n(ctorch.serialization\n_get_layout\nS'__globals__'\ntR.")
    assert isinstance(found, Stub)
    assert (found.kind, found.args[1]) == ("builtins.getattr", "__globals__")
    assert issubclass(found.args[0], Stub)


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\nexec\n.",
        b"ctorch\nload\n.",
        b"ctorch.serialization\nload\n.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x82\x01.",  # an extension code
        b"Vtext\nQ.",  # a persistent id
    ],
)
def test_names_outside_the_list_are_refused_in_every_spelling(code: bytes) -> None:
    with pytest.raises(SecateurError):
        read_stubs(code)


def test_no_listed_name_is_a_class_of_torch_while_it_is_read(folder: Path) -> None:
    """BUILD can set attributes of a class that is on the stack: so these are classes of this one reading."""
    before = dict(vars(ChunkStorageMetadata))
    code = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n"
        b"N}\x8c\x08__init__\x8c\x04evils\x86b."  # setattr(ChunkStorageMetadata, "__init__", "evil")
    )
    with pytest.raises(SecateurError):
        read_stubs(code)
    assert dict(vars(ChunkStorageMetadata)) == before
    assert all(not name.startswith("_load") for names in ALLOWED.values() for name in names)


def test_a_huge_memo_index_takes_no_memory() -> None:
    """The C unpickler would make room for 2**32 entries."""
    assert read_stubs(b"K\x01r\xff\xff\xff\xff.") == 1


SEED = b""


def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    global SEED
    SEED = SEED or (save(dict(TENSORS), tmp_path_factory.mktemp("seed") / "s") / ".metadata").read_bytes()
    return SEED


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_metadata_is_an_error_or_the_same_description(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it ran"))
    good = bytearray(sample(tmp_path_factory))
    kind = data.draw(st.sampled_from(["noise", "flip", "cut", "insert"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if kind == "noise":
        good = bytearray(data.draw(st.binary(max_size=200)))
    elif kind == "flip":
        good[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del good[at:]
    else:
        good[at:at] = data.draw(st.binary(min_size=1, max_size=20) | st.just(b"cos\nsystem\n(S'true'\ntR"))
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "__0_0.distcp").write_bytes(bytes(10_000))
    (folder / ".metadata").write_bytes(bytes(good))
    try:
        stored = read_dcp(folder)
    except SecateurError:
        return
    finally:
        shutil.rmtree(folder)
    for tensor in stored.tensors.values():
        assert all(chunk.place.path.parent == folder.resolve() for chunk in tensor.chunks)


@pytest.mark.parametrize(
    "path",
    ["../other.distcp", "/etc/hostname", "sub/../../other.distcp", "sub/../__0_0.distcp", "link", "linked/x", ""],
)
def test_a_file_outside_the_folder_is_refused(folder: Path, path: str) -> None:
    shutil.copy(folder / "__0_0.distcp", folder.parent / "other.distcp")
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder.parent / "other.distcp")
    (folder.parent / "x").write_bytes(bytes(10_000))
    (folder / "linked").symlink_to(folder.parent)
    change(folder, lambda metadata: setattr(place(metadata, "w")[1], "relative_path", path))
    with pytest.raises(SecateurError, match=r"expected one inside it|expected a relative path"):
        read_dcp(folder)


def test_a_path_through_a_folder_inside_is_fine(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "__0_0.distcp").rename(folder / "sub/__0_0.distcp")

    def move(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "sub/__0_0.distcp"

    change(folder, move)
    assert read_dcp(folder).files == {".metadata", "sub/__0_0.distcp"}


def edits() -> dict[str, tuple[Callable[[Metadata], Any], str]]:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([4, 3]))
    return {
        "missing file": (lambda m: setattr(place(m, "w")[1], "relative_path", "__9_0.distcp"), "is missing"),
        "beyond the end": (lambda m: setattr(place(m, "w")[1], "offset", 10**9), "truncated or damaged"),
        "before the start": (lambda m: setattr(place(m, "w")[1], "offset", -1), "truncated or damaged"),
        "length of another type": (lambda m: setattr(place(m, "w")[1], "length", "9"), "truncated or damaged"),
        "a transformed stream": (
            lambda m: setattr(place(m, "w")[1], "transform_descriptors", ["zstd"]),
            "expected plain bytes",
        ),
        "no place": (lambda m: m.storage_data.pop(place(m, "w")[0]), "w, chunk at .*: 0 places"),
        "no place for bytes": (lambda m: m.storage_data.pop(place(m, "nested.list.0")[0]), "0 places"),
        "no entry": (lambda m: m.state_dict_metadata.pop("w"), "data for .'w'., which is no entry"),
        "no tensor": (lambda m: m.state_dict_metadata.clear(), "no tensor"),
        "a chunk too few": (
            lambda m: setattr(about(m), "chunks", []),
            "0 chunks hold 0 entries, expected each of its 12",
        ),
        "a chunk outside": (lambda m: setattr(about(m), "size", torch.Size([3, 3])), "is not inside its shape"),
        "a chunk twice": (lambda m: setattr(about(m), "chunks", [chunk, chunk]), "0 places"),
        "chunks of another kind": (lambda m: setattr(about(m), "chunks", ()), "found tuple, expected list"),
        "another number of axes": (lambda m: setattr(about(m), "size", torch.Size([12])), "is not inside its shape"),
        "a sparse tensor": (lambda m: setattr(about(m).properties, "layout", torch.sparse_coo), "expected a dense"),
        "a dtype of no kind": (lambda m: setattr(about(m).properties, "dtype", "float"), "expected one of torch's"),
        "a path of objects": (lambda m: m.planner_data.update(w=("w", 1.5)), "expected names and numbers"),
        "a path missing": (lambda m: m.planner_data.pop("w"), "no path for .'w'"),
        "paths of another kind": (lambda m: setattr(m, "planner_data", [1]), "found list, expected dict"),
        "no storage": (lambda m: setattr(m, "storage_data", None), "found NoneType, expected dict"),
        "a name of no text": (lambda m: m.state_dict_metadata.update({3: about(m)}), "found int, expected str"),
        "an entry of no kind": (lambda m: m.state_dict_metadata.update(w=5), "TensorStorageMetadata was expected"),
    }


@pytest.mark.parametrize("name", edits())
def test_metadata_that_does_not_fit_its_files_is_refused(folder: Path, name: str) -> None:
    edit, message = edits()[name]
    change(folder, edit)
    with pytest.raises(SecateurError, match=message):
        read_dcp(folder)


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
    place = StoredBytes(path=Path("x"), start=0, length=1)
    return Chunk(offsets=offsets, sizes=sizes, place=place, is_archive=True)


@pytest.mark.parametrize(
    ("boxes", "whole"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (2, 4))], True),
        ([((0, 0), (4, 1)), ((0, 1), (4, 3))], True),
        ([((0, 0), (2, 4)), ((2, 0), (2, 1)), ((2, 1), (2, 3))], True),  # no grid
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], False),  # rows 1 twice, 3 never
        ([((0, 0), (2, 4)), ((0, 0), (2, 4))], False),
        ([((0, 0), (3, 2)), ((2, 0), (1, 4)), ((3, 0), (1, 4)), ((0, 2), (1, 2))], False),  # 16 entries, no tiling
    ],
)
def test_chunks_must_be_the_whole_tensor_once(boxes: list[Any], whole: bool) -> None:
    chunks = [chunk(*box) for box in boxes]
    if whole:
        assert whole_tensor("w", torch.float32, (4, 4), chunks).chunks == tuple(chunks)
        return
    with pytest.raises(SecateurError, match="w: its chunks overlap"):
        whole_tensor("w", torch.float32, (4, 4), chunks)


def test_the_same_format_with_the_class_of_olmo_core_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "olmo_core.distributed.checkpoint.filesystem"
    theirs = type("_StorageInfo", (), {"__module__": name, "__qualname__": "_StorageInfo"})
    for package in ("olmo_core", "olmo_core.distributed", "olmo_core.distributed.checkpoint", name):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setattr(sys.modules[name], "_StorageInfo", theirs, raising=False)
    expected = read_dcp(folder)

    def rename(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = theirs()
            vars(metadata.storage_data[index]).update(vars(info))

    change(folder, rename)
    assert name.encode() in (folder / ".metadata").read_bytes()
    assert read_dcp(folder) == expected


def test_metadata_without_a_state_dict_layout_is_fine(folder: Path) -> None:
    change(folder, lambda metadata: setattr(metadata, "planner_data", None))
    assert read_dcp(folder).paths is None


def test_a_folder_with_a_truncated_file_leaves_nothing(tmp_path: Path) -> None:
    names = {"model.layers.0.mlp.gate.weight": (8, 400), "model.layers.0.mlp.experts.down_proj": (8, 90, 80)}
    names |= {name.replace("layers.0", "layers.2"): shape for name, shape in names.items()}
    source = save({name: torch.randn(shape) for name, shape in names.items()}, tmp_path / "source")
    before = tensors_of(source)
    assert before
    data = (source / "__0_0.distcp").read_bytes()
    (source / "__0_0.distcp").write_bytes(data[:-1000])
    with pytest.raises(SecateurError, match="truncated or damaged"):
        apply_to_checkpoint(source, PLAN, tmp_path / "out")
    (source / "__0_0.distcp").write_bytes(data[:2000] + bytes(len(data) - 4000) + data[-2000:])
    with pytest.raises(SecateurError, match=r"cannot be read|is damaged"):
        apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("change_of", [(0, -4), (4, 0), (-4, 4)])
def test_pieces_that_overlap_or_leave_bytes_out_are_refused(folder: Path, change_of: tuple[int, int]) -> None:
    """What an opaque entry holds is not looked at: half of one would be copied as if it were whole."""

    def move(metadata: Metadata) -> None:
        info = max(metadata.storage_data.values(), key=lambda info: info.offset)
        info.offset, info.length = info.offset + change_of[0], info.length - abs(change_of[0]) + change_of[1]

    change(folder, move)
    with pytest.raises(SecateurError, match=r"\.metadata: the pieces of __0_0\.distcp that it names overlap or leave"):
        read_dcp(folder)


def test_an_entry_may_end_where_its_file_ends_and_not_after_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    assert bytes_of(tmp_path / "f", 4, 6, "w") == StoredBytes(path=tmp_path / "f", start=4, length=6)
    with pytest.raises(SecateurError, match=r"w is at bytes 4 \+ 7, but the file has 10"):
        bytes_of(tmp_path / "f", 4, 7, "w")
