"""`observe`, `plan`, `prune` and `eval` on V-MoE image classifiers, with images as data."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor

from secateur import cli
from secateur.criteria import CRITERIA
from secateur.data.images import read_images
from secateur.decide.by_score import plan_by_criterion
from secateur.decide.keep import Keep
from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.model_folder.evaluation.accuracy import difference, scores, summary
from secateur.model_folder.evaluation.evaluate import evaluate
from secateur.model_folder.evaluation.on_images import evaluate_images
from secateur.model_folder.measure import on_images
from secateur.model_folder.measure.image_batches import draw
from secateur.model_folder.measure.on_images import ImageObservation, loaded
from secateur.model_folder.read import load as load_module
from secateur.model_folder.read.modality import modality_of
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.read.tensor_files import read_tensor_files
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.models.vmoe.pixels import FILE, default_pixels, read_pixels
from secateur.observation.activations import ActivationObserver
from secateur.observation.observation import Observation
from secateur.plans import Plan
from secateur.stats import DEFAULT_SUMS
from support.claims import ALL, outcome
from support.faults import Kill
from support.flax_files import params, random_arrays, write
from support.model_folders import contents, saved
from support.small_runs import in_child
from support.tiny_vision import tiny_vmoe
from support.zero_slot_models import zero_slot_plan

Run = Callable[..., tuple[int, str, str]]
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
LABELS = np.repeat(np.arange(5), 6)


def model_folder(path: Path, kind: str = "few places", **changes: Any) -> Any:
    model = tiny_vmoe(kind, **changes)
    model.save_pretrained(path)
    (path / FILE).write_text(json.dumps(default_pixels(model.config)))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the same images as a file and as a folder."""
    root = tmp_path_factory.mktemp("made")
    model_folder(root / "source")
    np.savez(root / "images.npz", images=IMAGES, labels=LABELS)
    for row, image in enumerate(IMAGES):
        (root / "images" / f"class {LABELS[row]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"class {LABELS[row]}" / f"{row:02}.png")
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, " ".join(captured.err.split())

    return command


def pixels(rows: list[int]) -> torch.Tensor:
    return torch.from_numpy(IMAGES[rows]).permute(0, 3, 1, 2).float() / 255 * 2 - 1


# --- observe and plan -----------------------------------------------------------------------------------------------


def test_what_a_model_reads_is_told_by_its_type_also_when_it_was_pruned(made: Path, tmp_path: Path, run: Run) -> None:
    words = ("--criterion", "random", "--keep", "0:4,2:6", "--verify-tokens", 0, "--quiet")
    assert run("prune", made / "source", *words, "--out", tmp_path / "out")[0] == 0
    assert read_tensor_files(tmp_path / "out").config["model_type"] == "secateur_moe"
    saved("qwen3_moe", tmp_path / "text")
    folders = {made / "source": "images", tmp_path / "out": "images", tmp_path / "text": "text"}
    assert {folder: modality_of(read_model_folder(folder)) for folder in folders} == folders
    observed = ("observe", tmp_path / "out", "--data", made / "images.npz", "--out", tmp_path / "s", "--quiet")
    assert run(*observed)[0] == 0
    assert [len(loads) for loads in Observation.load(tmp_path / "s").stats.loads().values()] == [4, 6]


def test_sums_on_request_of_images_are_recorded_or_refused_before_the_model_is_loaded(
    made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("observe", made / "source", "--data", made / "images.npz", "--out", tmp_path / "s", "--json")
    status, out, err = run(*words, "--sums", "input_gram", "--sums", "output_sum")
    assert status == 0, err
    found = Observation.load(tmp_path / "s").stats
    assert found.sums == (*DEFAULT_SUMS, "output_sum", "input_gram")
    assert json.loads(out)["sums_bytes"] == sum(
        8 * one.sums[name].numel() for one in found.layers.values() for name in ("output_sum", "input_gram")
    )
    monkeypatch.setattr(on_images, "loaded", lambda *_: pytest.fail("loaded"))
    status, _, err = run(*words, "--force", "--sums", "neuron_gram")
    assert (status, "the activations in front of the down projection are seen in" in err) == (2, True)
    status, _, err = run(*words, "--force", "--sums", "co_selection", "--dry-run")
    assert (status, "not seen which experts a token has together" in err) == (2, True)


def test_observe_records_the_model_and_its_images(made: Path, tmp_path: Path, run: Run) -> None:
    results = {}
    for name in ("images.npz", "images"):
        words = ("--data", made / name, "--samples", 20, "--batch-size", 4, "--seed", 3, "--json")
        status, out, err = run("observe", made / "source", *words, "--out", tmp_path / name)
        assert status == 0, err
        results[name] = json.loads(out)
    assert results["images"]["stats_digest"] == results["images.npz"]["stats_digest"]
    found = Observation.load(tmp_path / "images")
    drawn = read_images(made / "images").draw(20, seed=3)
    assert found.data == {
        "specs": [str(made / "images")],
        "images": 20,
        "of": 30,
        "seed": 3,
        "digest": drawn.digest(),
        "batch_size": 4,
        "versions": found.data["versions"],
    }
    model = tiny_vmoe("few places")
    observer = ActivationObserver(describe_moe(model))
    rows = np.random.default_rng(3).permutation(30)[:20].tolist()
    for first in range(0, 20, 4):
        logits_of(model, pixels(rows[first : first + 4]))
    for layer, one in observer.read().layers.items():
        other = found.stats.layers[layer]
        assert (one.num_tokens, one.token_count.tolist()) == (other.num_tokens, other.token_count.tolist())
        assert one.num_tokens == 20 * 17
        assert other.norm_sum is not None
        torch.testing.assert_close(one.norm_sum, other.norm_sum, rtol=1e-4, atol=1e-6)


def test_weights_that_are_no_numbers_are_told_with_the_folder_of_the_model(
    made: Path, tmp_path: Path, run: Run
) -> None:
    model = tiny_vmoe("few places")
    with torch.no_grad():
        model.vmoe.layers[0].mlp.experts.down_proj.fill_(math.nan)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(made / "source" / FILE, tmp_path / "model" / FILE)
    status, _, err = run(
        "observe", tmp_path / "model", "--data", made / "images.npz", "--out", tmp_path / "s", "--quiet"
    )
    assert status == 2
    assert f"{tmp_path}/model: vmoe.layers.0.mlp.experts: norm_sum of expert" in err.replace("\n", "")
    assert "either its weights are not finite" in err


def test_the_size_of_the_batch_changes_no_count_where_images_are_routed_in_groups(made: Path, tmp_path: Path) -> None:
    found, drawn = read_model_folder(made / "source"), draw([str(made / "images.npz")], None, 0)
    runs = [ImageObservation(found, drawn, tmp_path / "s", batch_size=size) for size in (2, 4, 30)]
    assert [len(run.batches) for run in runs] == [15, 8, 1]
    loads = [run.observe().stats.loads() for run in runs]
    assert loads[0] == loads[1] == loads[2]
    assert ImageObservation(found, drawn, tmp_path / "s").batches.size == 64


@pytest.mark.parametrize(("group_images", "size"), [(3, 66), (None, 64), (100, 100)])
def test_without_a_size_a_batch_is_made_of_whole_groups(
    group_images: int, size: int, made: Path, tmp_path: Path
) -> None:
    model_folder(tmp_path / "m", group_images=group_images)
    drawn = draw([str(made / "images.npz")], None, 0)
    assert ImageObservation(read_model_folder(tmp_path / "m"), drawn, tmp_path / "s").batches.size == size


@pytest.mark.slow
def test_every_criterion_on_data_makes_a_plan_of_the_statistics(made: Path, tmp_path: Path, run: Run) -> None:
    stats = tmp_path / "s"
    assert run("observe", made / "source", "--data", made / "images", "--out", stats, "--quiet")[0] == 0
    kept = {}
    for name in [name for name, one in CRITERIA.items() if one.needs_data]:
        words = ("--criterion", name, "--keep", 0.5, "--out", tmp_path / name, "--quiet")
        status, _, err = run("plan", stats, *words)
        assert status == 0, err
        kept[name] = Plan.load(tmp_path / name).layers
    assert len(kept) >= 7
    assert {one.experts_after for plan in kept.values() for one in plan.values()} == {4}
    loads = Observation.load(stats).stats.loads()
    for layer, one in kept["frequency"].items():
        assert min(loads[layer][kept] for kept in one.order) >= max(loads[layer][gone] for gone in one.dropped)


# --- prune ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["few places", pytest.param("ensemble", marks=pytest.mark.slow)])
def test_prune_does_all_and_the_result_is_verified(kind: str, made: Path, tmp_path: Path, run: Run) -> None:
    model_folder(tmp_path / "source", kind)
    words = ("--criterion", "frequency", "--keep", 0.5, "--data", made / "images.npz", "--samples", 16, "--json")
    status, out, err = run("prune", tmp_path / "source", *words, "--out", tmp_path / "out", "--undo", tmp_path / "undo")
    assert status == 0, err
    result = json.loads(out)
    # a V-MoE says nothing, so that it cannot be asked to go on is no failure
    assert outcome(result["verified"]["checks"]) == dict.fromkeys(ALL, True) | {"speaks": None}, result["verified"]
    stats = Observation.load(tmp_path / "out/observed/stats.safetensors")
    assert stats.data["images"] == 16
    limits = describe_moe(tiny_vmoe(kind)).limits()
    expected = plan_by_criterion("frequency", Keep(share=0.5), limits, stats=stats.stats)
    assert Plan.load(tmp_path / "out/plan.json").layers == expected.layers
    assert read_pixels(tmp_path / "out").image_size == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "undo"]


def pruning_of(made: Path, root: Path) -> list[object]:
    """The words of it, once the source is there."""
    shutil.copytree(made / "source", root / "source")
    return ["--keep", "0.5", "--data", str(made / "images.npz"), "--quiet"]


@pytest.fixture(scope="module")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert in_child(typed, root, pruning_of(made, root)) == 0
    return root / "out"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pruning_that_was_killed_goes_on_after_the_pass(
    when: str, made: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Before the statistics are written nothing is kept, and the pass is taken again."""
    words = pruning_of(made, tmp_path / "two")
    target = "secateur.observation.observation:Observation.save" if when == "before" else "secateur.files.kept:Kept.add"
    kill = Kill(target, when=when)
    assert in_child(typed, tmp_path / "two", words, kill) == -9
    hooks = [Kill("secateur.model_folder.measure.on_images:ImageObservation.observe")] if when == "after" else []
    assert in_child(typed, tmp_path / "two", words, *hooks) == 0
    one, two = contents(undisturbed), contents(tmp_path / "two/out")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name] and not name.endswith((".json", ".html", ".md"))] == []
    assert not (tmp_path / "two/.out.pruning").exists()


def typed(root: Path, words: list[object], *hooks: Callable[[], None]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # sums differ in their last places with it
    for hook in hooks:
        hook()
    sys.argv = ["secateur", "prune", str(root / "source"), "--out", str(root / "out"), *map(str, words)]
    cli.main()


# --- eval -----------------------------------------------------------------------------------------------------------


def test_accuracy_and_cross_entropy_of_three_images_are_those_computed_by_hand() -> None:
    logits = torch.zeros(3, 6)
    logits[0, 2], logits[1, 0] = math.log(5), math.log(5)
    logits[1, 4] = logits[2, 5] = -1.0
    found = scores(logits, torch.tensor([2, 1, 5]))
    assert found["accuracy"].tolist() == [1, 0, 0]
    assert found["top5_accuracy"].tolist() == [1, 1, 0]
    expected = torch.tensor(
        [math.log(2), math.log(9 + math.exp(-1)), math.log(5 + math.exp(-1)) + 1], dtype=torch.float64
    )
    torch.testing.assert_close(found["cross_entropy"], expected, rtol=1e-6, atol=1e-6)
    result = summary(found)
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["accuracy_standard_error"] == pytest.approx(1 / 3)  # deviation sqrt(1/3), over sqrt(3)
    more = difference(found, {name: torch.zeros(3, dtype=torch.float64) for name in found})["top5_accuracy"]
    assert more["mean"] == pytest.approx(2 / 3)
    assert 0 <= more["low"] <= more["mean"] <= more["high"] <= 1
    assert "top5_accuracy" not in scores(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(SecateurError, match="logits that are no numbers"):
        scores(torch.tensor([[0.0, math.nan]]), torch.tensor([0]))


def test_the_scores_of_members_are_their_mean() -> None:
    by_member = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    found = scores(by_member, labels)
    alone = [scores(by_member[:, member], labels) for member in range(3)]
    for name, each in found.items():
        torch.testing.assert_close(each, torch.stack([one[name] for one in alone]).mean(dim=0))


@pytest.mark.slow
def test_eval_measures_models_side_by_side(made: Path, tmp_path: Path, run: Run) -> None:
    model = model_folder(tmp_path / "ensemble", "ensemble", num_labels=7)
    model_folder(tmp_path / "other", num_labels=7)
    words = ("--data", made / "images", "--seed", 1, "--batch-size", 10)
    shutil.copytree(tmp_path / "ensemble", tmp_path / "same")
    status, out, err = run("eval", *(tmp_path / name for name in ("ensemble", "other", "same")), *words, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["data"]["digest"] == read_images(made / "images.npz").draw(None, seed=1).digest()
    ensemble, other, same = result["models"]
    assert {one["mean"] for one in same["difference"].values()} == {0}

    rows = np.random.default_rng(1).permutation(30).tolist()
    labels = torch.from_numpy(LABELS[rows])
    with torch.no_grad():
        outputs = [model(pixels(rows[first : first + 10])) for first in range(0, 30, 10)]
    logits = torch.cat([one.logits for one in outputs])
    members = torch.cat([one.member_logits for one in outputs])
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    assert ensemble["accuracy"] == pytest.approx(right / 30)
    in_five = sum(int(label) in row.topk(5).indices.tolist() for row, label in zip(logits, labels, strict=True))
    assert ensemble["top5_accuracy"] == pytest.approx(in_five / 30)
    assert ensemble["cross_entropy"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-4)
    losses = [float(cross_entropy(members[:, member], labels)) for member in (0, 1)]
    assert ensemble["members"]["cross_entropy"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert other["members"] is ensemble["difference"] is None
    assert other["difference"]["accuracy"]["mean"] == pytest.approx(other["accuracy"] - ensemble["accuracy"])
    assert ensemble["parameters"] == sum(one.numel() for one in model.parameters())
    assert ensemble["flops_per_image"] == pytest.approx(sum(ensemble["flops_by_part"].values()))
    assert 0 < ensemble["pairs_per_image"]["0"] <= 2 * 2 * 17
    assert ensemble["images_per_second"] > 0

    status, out, err = run("eval", tmp_path / "ensemble", tmp_path / "other", *words, "--quiet")
    assert status == 0, err
    head, first, second = out.splitlines()[1:]
    assert out.startswith("30 images of 30\n")
    for title in ("accuracy", "top 5", "cross entropy", "a member's accuracy", "images/s", "GFLOP/image", "95 % range"):
        assert title in head
    assert f"{100 * right / 30:.2f} %" in first
    assert second.startswith(str(tmp_path / "other"))


def test_what_zero_slots_would_have_computed_is_not_counted(made: Path, tmp_path: Path) -> None:
    apply_to_model(made / "source", zero_slot_plan((0, 2)), tmp_path / "out")
    (found,) = evaluate_images([tmp_path / "out"], read_images(made / "images.npz"), batch_size=30)
    model = loaded(read_model_folder(tmp_path / "out"), "cpu")
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        logits_of(model, pixels(list(range(30))))
    assert 30 * found["flops_per_image"] == pytest.approx(counter.get_total_flops())


def test_classes_in_another_order_than_that_of_the_model_are_refused(made: Path, tmp_path: Path, run: Run) -> None:
    names = {label: f"class {label}" for label in range(5)}
    for order, status in ((names, 0), ({label: names[4 - label] for label in names}, 2)):
        folder = tmp_path / str(status)
        model_folder(folder, id2label=order)
        found = run("eval", folder, "--data", made / "images", "--quiet")
        assert found[0] == status, found
    assert f"class folder 0 is 'class 0', but {tmp_path / '2'} calls class 0 'class 4'" in found[2]
    status, _, err = run("eval", tmp_path / "0", tmp_path / "2", "--data", made / "images", "--quiet")
    assert (status, f"{tmp_path / '2'} calls class 0" in err) == (2, True), err


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--data is missing"),
        (("--data", "{made}/images", "--data", "{made}/images.npz"), "--data is given 2 times; expected one folder"),
        (("--data", "{made}/nowhere"), "nowhere: not there, expected a folder with a subfolder for every class"),
        (("--data", "{made}/images", "--sequence-length", "8"), "--sequence-length: for text, but the model reads im"),
        (("--data", "{made}/images", "--no-pack", "--split", "test"), "--pack, --split: for text"),
        (("--data", "{made}/images", "--activations", "disk"), "--activations: for text"),
        (("--data", "{made}/images", "--batch-size", "5"), "routes 2 images together (group_images), expected a mul"),
        (("--data", "{made}/images", "--samples", "31"), "31 images wanted, it has 30"),
    ],
)
def test_what_cannot_be_observed_is_refused(
    words: tuple[str, ...], message: str, made: Path, tmp_path: Path, run: Run
) -> None:
    given = [word.format(made=made) for word in words]
    status, _, err = run("observe", made / "source", *given, "--out", tmp_path / "s")
    assert (status, message in err) == (2, True), err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_pixels_is_refused_before_it_is_run(made: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(made / "source", tmp_path / "source")
    (tmp_path / "source" / FILE).unlink()
    for command in (("observe", "--out", tmp_path / "s"), ("prune", "--keep", 0.5, "--out", tmp_path / "p"), ("eval",)):
        status, _, err = run(command[0], tmp_path / "source", "--data", made / "images", *command[1:])
        assert (status, "preprocessor_config.json: not there" in err) == (2, True), err


def test_a_model_that_does_not_fit_in_memory_is_refused(
    made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "free_memory", lambda: 1000)
    for command in (("observe", "--out", tmp_path / "s"), ("eval",)):
        status, _, err = run(command[0], made / "source", "--data", made / "images", *command[1:])
        assert (status, "models of images are loaded whole; it needs" in err) == (2, True), err


def test_text_and_images_are_not_compared_and_eval_names_options_of_text(made: Path, tmp_path: Path, run: Run) -> None:
    saved("qwen3_moe", tmp_path / "text")
    status, _, err = run("eval", made / "source", tmp_path / "text", "--data", made / "images")
    assert (status, "models of text and of images cannot be compared" in err) == (2, True), err
    status, _, err = run("eval", made / "source", "--data", made / "images", "--no-stream")
    assert (status, "--stream: for text" in err) == (2, True), err
    model_folder(tmp_path / "two", num_labels=2)
    status, _, err = run("eval", tmp_path / "two", "--data", made / "images")
    assert (status, "labels up to 4, expected 0 to 1" in err) == (2, True), err


def test_models_of_different_numbers_of_classes_are_not_compared(made: Path, tmp_path: Path, run: Run) -> None:
    model_folder(tmp_path / "ten", num_labels=10)
    status, _, err = run("eval", tmp_path / "ten", made / "source", "--data", tmp_path / "not read")
    assert (status, f"source: it tells 5 classes, {tmp_path / 'ten'} 10" in err) == (2, True), err


@pytest.mark.parametrize("name", [FILE, "model.safetensors"])
def test_a_model_that_is_changed_while_it_is_measured_on_images_is_an_error(
    made: Path, tmp_path: Path, name: str
) -> None:
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    change = lambda what, done, total: os.utime(source / name, (1, 1))  # noqa: E731
    with pytest.raises(SecateurError, match=f"{name}: it was changed while it was in use: .*; start again"):
        evaluate(source, data=made / "images.npz", on_progress=change)


def test_a_model_without_a_classifier_is_observed_and_not_evaluated(made: Path, tmp_path: Path, run: Run) -> None:
    model = tiny_vmoe("few places")
    model.vmoe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / FILE).write_text(json.dumps(default_pixels(model.config)))
    status, _, err = run("eval", tmp_path / "base", "--data", tmp_path / "not read")
    assert (status, "base: a VMoEModel, expected a VMoEForImageClassification" in err) == (2, True), err
    stats = []
    for source in (tmp_path / "base", made / "source"):
        words = ("--data", made / "images.npz", "--samples", 4, "--json", "--force", "--out", tmp_path / "s")
        status, out, err = run("observe", source, *words)
        assert status == 0, err
        stats.append(json.loads(out)["stats_digest"])
    assert stats[0] == stats[1]


def test_tasks_of_text_are_not_given_to_models_of_images(
    made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    words = ("--criterion", "random", "--keep", "0:4,2:6", "--verify-tokens", 0, "--quiet")
    assert run("prune", made / "source", *words, "--out", tmp_path / "pruned")[0] == 0
    for model in (made / "source", tmp_path / "pruned"):
        for data in ((), ("--data", made / "images")):
            status, _, err = run("eval", model, *data, "--lm-eval", "arc_easy")
            assert (status, "--lm-eval: for text, but the model reads images" in err) == (2, True), err


@pytest.mark.parametrize("command", ["observe", "prune", "plan", "eval"])
def test_a_negative_seed_is_refused_by_the_option(command: str, run: Run) -> None:
    status, _, err = run(command, "model", *(() if command == "eval" else ("--out", "out")), "--seed", -1)
    assert (status, "Invalid value for '--seed'" in err) == (2, True), err


@pytest.mark.parametrize("removed", ["mixed", "foo"])
@pytest.mark.parametrize("command", [("plan",), ("prune",), ("apply", "plan.json")])
def test_only_the_two_meanings_of_a_removed_expert_can_be_asked_for(
    command: tuple[str, ...], removed: str, run: Run
) -> None:
    status, _, err = run(command[0], "model", *command[1:], "--out", "out", "--removed", removed)
    assert (status, f"--removed {removed}: expected reroute or zero-slot" in err) == (2, True), err


def test_a_home_folder_is_found_as_for_text(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(made))
    assert draw(["~/images"], 3, 0).images.digest() == draw([str(made / "images")], 3, 0).images.digest()


# --- convert-vmoe ---------------------------------------------------------------------------------------------------


def test_a_converted_checkpoint_says_how_its_pixels_are_made(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "vmoe", params(random_arrays()))
    assert run("convert-vmoe", tmp_path / "vmoe", "--top-k", 2, "--out", tmp_path / "out", "--quiet")[0] == 0
    white = np.full((9, 9, 3), 255, dtype=np.uint8)
    assert torch.equal(read_pixels(tmp_path / "out")([white]), torch.ones(1, 3, 4, 4))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert torch.equal(processor([white], return_tensors="pt")["pixel_values"], torch.ones(1, 3, 4, 4))
