"""Fine-tuning of image classifiers: classes, new heads, moved images, and a killed run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from secateur.data.images import read_images
from secateur.errors import SecateurError
from secateur.finetuning.images import ImageItems, augmented, check_classes
from secateur.finetuning.options import FinetuneOptions
from secateur.model_folder.evaluation.on_images import evaluate_images
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.read.tensor_files import read_tensor_files
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.models.vmoe.pixels import FILE, read_pixels
from secateur.plans import LayerPlan, Plan
from support.faults import Kill
from support.small_finetunes import files_of, image_folder, image_options, run, write_images
from support.small_runs import in_child


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    options = image_options(root, eval_data=(str(root / "train.npz"),), steps=20, learning_rate=5e-3)
    run(root, root / "tuned", options)
    return root / "tuned"


def test_classes_are_learnt(tuned: Path) -> None:
    record = json.loads((tuned / "finetune.json").read_text())
    assert record["router_aux_loss"] == {"from": "config", "importance_loss_coef": 0.005, "load_loss_coef": 0.005}
    before, after = record["evaluations"]
    assert after["accuracy"] > before["accuracy"] + 0.3
    assert after["loss"] < before["loss"]


def test_the_measured_accuracy_and_loss_are_those_of_the_folder(root: Path, tuned: Path) -> None:
    images = read_images(root / "train.npz")
    model = AutoModelForImageClassification.from_pretrained(tuned).eval()
    pixels = read_pixels(tuned)([images.image(row) for row in range(len(images))])
    labels = torch.from_numpy(images.labels)
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in pixels.split(8)])  # the batches that were measured
    measured = json.loads((tuned / "finetune.json").read_text())["evaluations"][-1]
    assert measured["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))
    assert measured["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-5)
    for name in (FILE, "config.json"):
        assert (tuned / name).read_bytes() == (root / "source" / name).read_bytes()


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        (("8", "9", "10", "11", "12"), None, "so that '11' is class 1, but the names are numbers"),
        (("a", "b", "c", "d", "e"), ("f", "g", "h", "i", "j"), "class 0 is 'a', the model calls it 'f', .*--new-head"),
        (("a", "b", "c", "d", "e"), ("b", "a", "c", "d", "e"), "class folder 0 is 'a', but .* calls class 0 'b'"),
        (("08", "09", "10", "11", "12"), None, None),
        (("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e"), None),
    ],
)
def test_labels_mean_to_the_model_what_the_folders_say(
    folders: tuple[str, ...], names: tuple[str, ...] | None, message: str | None, root: Path, tmp_path: Path
) -> None:
    """Without names of its own the model calls its classes LABEL_0 to LABEL_4."""
    shutil.copytree(root / "source", tmp_path / "model")
    if names is not None:
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | labels))
    for name in folders:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "image.png")
    images, found = read_images(tmp_path / "data"), read_model_folder(tmp_path / "model")
    with nullcontext() if message is None else pytest.raises(SecateurError, match=message):
        check_classes(images, found, new_head=False)
    check_classes(images, found, new_head=True)


def test_a_new_head_is_for_the_classes_of_the_data(root: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("bird", "cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                tmp_path / "data" / name / f"{number}.png"
            )
    options = image_options(root, data=(str(tmp_path / "data"),), steps=2)
    with pytest.raises(SecateurError, match="3 classes, the model knows 5; --new-head"):
        run(root, tmp_path / "out", options)
    new = image_options(root, data=(str(tmp_path / "data"),), steps=2, new_head=True)
    run(root, tmp_path / "out", new)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "bird", 1: "cat", 2: "dog"}
    assert model.config.label2id == {"bird": 0, "cat": 1, "dog": 2}
    assert model.classifier.weight.shape == (3, 32)
    assert read_model_folder(tmp_path / "out").counts == {0: 8, 2: 8}
    before, after = (load_file(path / "model.safetensors") for path in (root / "source", tmp_path / "out"))
    assert before.keys() == after.keys()
    # classes have names now, and those of other data are not taken for them
    (tmp_path / "data" / "bird").rename(tmp_path / "data" / "fish")
    again = image_options(root, data=(str(tmp_path / "data"),), steps=1)
    (tmp_path / "out").rename(tmp_path / "source")
    with pytest.raises(SecateurError, match=r"class folder 0 is 'cat', but .* calls class 0 'bird'.*--new-head"):
        run(tmp_path, tmp_path / "new", again)


def test_images_are_measured_in_the_order_and_the_groups_of_eval(tmp_path: Path) -> None:
    """Where there are few places, what is routed together decides what is dropped."""
    root = image_folder(tmp_path, eval_capacity_factor=0.5, batch_priority="max", group_images=4)
    options = image_options(root, eval_data=(str(root / "train.npz"),), steps=1, batch_size=6, seed=3)
    measured = run(root, tmp_path / "out", options)["evaluations"][0]
    images = read_images(root / "train.npz")
    found, sorted_by_class = (evaluate_images([root / "source"], one)[0] for one in (images.draw(None, seed=0), images))
    assert measured["loss"] == pytest.approx(found["cross_entropy"], abs=1e-6)
    assert abs(found["cross_entropy"] - sorted_by_class["cross_entropy"]) > 1e-4


def test_the_last_class_may_have_no_example(root: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "four.npz", 4)
    options = image_options(root, data=(str(tmp_path / "four.npz"),), eval_data=(str(root / "train.npz"),), steps=1)
    run(root, tmp_path / "out", options, dry_run=True)
    with pytest.raises(SecateurError, match="labels up to 4, expected 0 to 3"):
        run(root, tmp_path / "out", dataclasses.replace(options, new_head=True), dry_run=True)


def test_a_model_without_a_classifier_is_refused_before_data_is_read(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    AutoModelForImageClassification.from_pretrained(root / "source").vmoe.save_pretrained(tmp_path / "source")
    for new_head in (False, True):
        with pytest.raises(SecateurError, match="source: a VMoEModel has no classifier"):
            run(tmp_path, tmp_path / "out", image_options(root, data=("nowhere.npz",), new_head=new_head), dry_run=True)


@pytest.mark.slow
def test_a_new_head_of_a_model_in_several_files_is_in_its_index(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(root / "source", source)
    (source / "model.safetensors").unlink()
    AutoModelForImageClassification.from_pretrained(root / "source").save_pretrained(source, max_shard_size="40KB")
    write_images(tmp_path / "three.npz", 3)
    run(tmp_path, tmp_path / "out", image_options(root, data=(str(tmp_path / "three.npz"),), new_head=True))
    found = read_tensor_files(tmp_path / "out")
    assert len(found.headers) > 1
    assert found.index is not None
    assert found.index["metadata"]["total_size"] == found.num_bytes
    assert found.tensors["classifier.weight"].shape == (3, 32)


def test_a_new_head_begins_without_an_opinion(root: Path, tmp_path: Path) -> None:
    options = image_options(root, eval_data=(str(root / "train.npz"),), steps=1, new_head=True)
    measured = run(root, tmp_path / "out", options)["evaluations"][0]
    assert measured["loss"] == pytest.approx(np.log(5), abs=1e-6)


@pytest.mark.slow
def test_layers_of_different_sizes_go_in_and_come_out(root: Path, tmp_path: Path) -> None:
    plan = Plan(layers={0: LayerPlan(experts_before=8, order=(1, 4, 5))}, criterion="random")
    apply_to_model(root / "source", plan, tmp_path / "source")
    run(tmp_path, tmp_path / "out", image_options(root, new_head=True))
    assert read_model_folder(tmp_path / "out").counts == {0: 3, 2: 8}
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "out")).__name__.startswith("Pruned")


def test_images_are_moved_by_up_to_an_eighth_and_flipped(root: Path) -> None:
    image = np.arange(16 * 8, dtype=np.uint8).reshape(16, 8, 1) + 1
    ways = [(down, right, flip) for down in range(-2, 3) for right in range(-1, 2) for flip in (False, True)]
    expected = {way: moved(image, *way) for way in ways}
    seen = set()
    for seed in range(300):
        found = augmented(image, np.random.default_rng(seed))
        match = [way for way, one in expected.items() if np.array_equal(found, one)]
        assert len(match) == 1
        seen |= set(match)
    assert len(seen) == len(ways) == 5 * 3 * 2  # all of them come
    small = np.ones((4, 4, 3), dtype=np.uint8)
    assert np.array_equal(augmented(small, np.random.default_rng(0)), small)  # an eighth is less than a pixel


def moved(image: Any, down: int, right: int, flip: bool) -> Any:
    """Pixel by pixel."""
    height, width, _ = image.shape
    found = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                found[y, x] = image[y - down, x - right]
    return found[:, ::-1] if flip else found


def test_every_epoch_moves_an_image_in_its_own_way_and_the_seed_decides(root: Path) -> None:
    images = read_images(root / "train.npz")
    one, same, other, plain = (ImageItems(images, augment_seed=seed) for seed in (1, 1, 2, None))

    def pixels(items: ImageItems, epoch: int) -> Any:
        items.set_epoch(epoch)
        return np.stack([items[row]["image"] for row in range(len(items))])

    assert np.array_equal(pixels(one, 3), pixels(same, 3))
    assert not np.array_equal(pixels(one, 3), pixels(one, 4))
    assert not np.array_equal(pixels(one, 3), pixels(other, 3))
    assert np.array_equal(pixels(plain, 3), np.stack([images.image(row) for row in range(len(images))]))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other classes": ({"data": ("six.npz",)}, "labels up to 5, expected 0 to 4: the model knows 5 classes"),
    "other classes to measure on": ({"eval_data": ("six.npz",)}, "labels up to 5, expected 0 to 4"),
    "two sets": ({"data": ("four.npz", "six.npz")}, "--data: 2 sets of images"),
    "nothing there": ({"data": ("nowhere.npz",)}, "nowhere.npz: not there"),
    "a setting of text": ({"sequence_length": 16}, "--sequence-length: a 'vmoe' model reads images"),
    "a loss of text": ({"router_aux_loss": 0.1}, "--router-aux-loss: a 'vmoe' model reads images"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(what: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = WRONG[what]
    monkeypatch.chdir(tmp_path)
    for name, classes in (("four", 4), ("six", 6)):
        write_images(tmp_path / f"{name}.npz", classes)
    with pytest.raises(SecateurError, match=message):
        run(root, tmp_path / "out", image_options(root, **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_does_not_say_how_pixels_are_scaled_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    (tmp_path / "source" / FILE).unlink()
    with pytest.raises(SecateurError, match="not there, and nothing else says how pixels are scaled"):
        run(tmp_path, tmp_path / "out", image_options(root))


# an epoch is 10 steps of 4 images here; noise on the routers and moved images depend on the step
STEP_END = "secateur.finetuning.trainer:FinetuneLog.on_step_end"


def noisy(root: Path) -> FinetuneOptions:
    return image_options(root, steps=14, save_steps=6, batch_size=4, augment=True, schedule="constant",
                         learning_rate=1e-3, eval_data=(str(root / "train.npz"),), eval_steps=5)  # fmt: skip


def start(root: Path, out: Path, resume: bool, hook: Callable[[], None] | None = None) -> None:
    if hook is not None:
        hook()
    run(root, out, noisy(root), resume=resume)


@pytest.mark.process
@pytest.mark.slow
def test_a_run_killed_in_the_second_epoch_ends_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    start(root, tmp_path / "whole", False)
    out = tmp_path / "out"
    assert in_child(start, root, out, False, Kill(STEP_END, 13)) == -signal.SIGKILL
    start(root, out, True)
    assert files_of(out) == files_of(tmp_path / "whole")
    one, other = (json.loads((folder / "finetune.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert (one["resumed_after_step"], other["resumed_after_step"]) == (12, None)
    assert (one["losses"], one["evaluations"]) == (other["losses"], other["evaluations"])
