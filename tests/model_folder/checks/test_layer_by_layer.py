"""Models of every kind are proved without being loaded as a whole, and what cannot be says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.model_folder.checks import computes
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.checks.oracle import kept_spans
from secateur.model_folder.read import load as load_module
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.stream.lazy_tensor import LazyTensor, Span
from secateur.plans import Plan
from support import tiny_vision
from support.claims import detail, fallen, not_checked
from support.model_folders import plan_of, saved
from support.odd_folders import llama4, qwen3_5
from support.zero_slot_models import zero_slot_plan

UNEVEN = plan_of((0, [1, 3, 6]), (2, [0, 2, 5, 7]))
ONE_COUNT = plan_of(*((layer, [0, 3, 5]) for layer in range(3)))


# kind -> (writes the source, the plan)
KINDS: dict[str, tuple[Callable[[Path], object], Plan]] = {
    "uneven": (lambda folder: saved("deepseek_v3", folder), plan_of((1, [1, 3, 6, 7]), (2, [0, 2, 5, 6, 7]))),
    "another order": (lambda folder: saved("qwen3_moe", folder), plan_of((0, [6, 1, 3]), (2, [5, 0]))),
    "zero slots": (lambda folder: saved("qwen3_moe", folder), zero_slot_plan(range(3))),
    "stacked on the disk": (lambda folder: saved("gpt_oss", folder), UNEVEN),
    "nested": (qwen3_5, ONE_COUNT),
    "every expert runs": (
        lambda folder: llama4(True).save_pretrained(folder, max_shard_size="60KB"),
        plan_of((1, [0, 3, 5]), (3, [2, 6, 7])),
    ),
}


def bytes_of_experts(folder: ModelFolder) -> int:
    return sum(folder.files.tensors[name].length for name, place in folder.located.items() if place.role == "expert")


@pytest.fixture
def _nothing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "free_memory", lambda: 1)

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded as a whole")

    monkeypatch.setattr(computes, "load", loads)


@pytest.mark.usefixtures("_nothing_whole")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_this_kind_is_proved_layer_by_layer(kind: str, tmp_path: Path) -> None:
    write, plan = KINDS[kind]
    write(tmp_path / "source")
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    told: list[tuple[str, int, int]] = []
    checks = verify_model(
        tmp_path / "source", tmp_path / "out", num_tokens=12, on_progress=lambda *now: told.append(now)
    )
    assert (fallen(checks), not_checked(checks)) == (set(), {"speaks"}), checks
    assert detail(checks, "logits").endswith("one layer in memory at a time")
    assert kind == "another order" or "bit for bit" in detail(checks, "logits")
    ends = {what: (done, total) for what, done, total in told if what != "comparing"}
    assert ends.keys() == {"running the source", "running the result"}
    assert len(set(ends.values())) == 1
    assert all(done == total > 2 for done, total in ends.values())


@pytest.mark.parametrize("kind", ["uneven", "stacked on the disk", "zero slots"])
def test_of_the_source_dropped_experts_are_not_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is shown does not depend on them; of the experts as many bytes are read as the result has."""
    write, plan = KINDS[kind]
    write(tmp_path / "source")
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    found, result = read_model_folder(tmp_path / "source"), read_model_folder(tmp_path / "out")
    spans = kept_spans(found, plan.filled(found.all_counts))
    not_read = sum(found.files.tensors[name].length - sum(length for _, length in spans[name]) for name in spans)
    assert not_read > 0
    assert bytes_of_experts(found) - not_read == bytes_of_experts(result)
    seen: set[str] = set()
    original = LazyTensor.__init__

    def init(self: LazyTensor, folder: Path, name: str, stored: StoredTensor, given: list[Span] | None = None) -> None:
        if folder == tmp_path / "source":
            assert given == spans.get(name), name
            seen.add(name)
        original(self, folder, name, stored, given)

    monkeypatch.setattr(LazyTensor, "__init__", init)
    assert fallen(verify_model(tmp_path / "source", tmp_path / "out", num_tokens=8)) == set()
    assert spans.keys() <= seen


@pytest.mark.usefixtures("_nothing_whole")
def test_a_model_of_images_that_does_not_fit_says_why_it_was_not_run(tmp_path: Path) -> None:
    tiny_vision.saved("few places", tmp_path / "source")
    apply_to_model(tmp_path / "source", plan_of((0, [0, 3, 5]), (2, [0, 3, 5])), tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out")
    assert (fallen(checks), not_checked(checks)) == (set(), {"logits", "speaks"})
    assert detail(checks, "logits").startswith("it reads images and is run as a whole; it needs ")
