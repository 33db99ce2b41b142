"""Images with labels, from folders and arrays, and the pixels that a V-MoE makes of them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from secateur.data.images import FORMATS, Images, read_images
from secateur.errors import SecateurError
from secateur.models.vmoe.pixels import FILE, default_pixels, read_pixels
from support.tiny_vision import tiny_vmoe

GREY = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
LABELS = np.array([0, 0, 1, 1, 1, 2])


def class_folder(path: Path, images: Any = GREY, labels: Any = LABELS) -> Path:
    """Written in another order than that of their names, which is the order of `images`."""
    for row in reversed(range(len(images))):
        folder = path / f"class {labels[row]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row]).save(folder / f"{row}.png")
    return path


def arrays(path: Path, **content: Any) -> Path:
    np.savez(path, **{"images": GREY, "labels": LABELS} | content)
    return path


def test_a_folder_and_arrays_of_the_same_images_are_the_same(tmp_path: Path) -> None:
    folder, stored = read_images(class_folder(tmp_path / "f")), read_images(arrays(tmp_path / "a.npz"))
    for found in (folder, stored):
        assert len(found) == 6
        assert found.labels.dtype == np.int64
        assert found.labels.tolist() == LABELS.tolist()
        assert all(np.array_equal(found.image(row), GREY[row][..., None]) for row in range(6))
    assert folder.classes == ("class 0", "class 1", "class 2")
    assert stored.classes is None
    assert folder.digest() == stored.digest()


def test_the_digest_knows_pixels_labels_order_and_shape(tmp_path: Path) -> None:
    same = read_images(arrays(tmp_path / "a.npz"))
    pixel, label, shape = GREY.copy(), LABELS.copy(), GREY.reshape(6, 5, 4)
    pixel[5, 3, 4] ^= 1
    label[5] = 1
    others = [{"images": pixel}, {"labels": label}, {"images": shape}]
    digests = {read_images(arrays(tmp_path / f"{n}.npz", **one)).digest() for n, one in enumerate(others)}
    digests |= {same.digest(), same.take([1, 0, 2, 3, 4, 5]).digest(), same.take(range(5)).digest()}
    assert len(digests) == 6


def test_drawn_images_are_of_the_set_none_twice_and_the_seed_decides(tmp_path: Path) -> None:
    images = read_images(arrays(tmp_path / "a.npz"))

    def pixels(found: Images) -> list[int]:
        return [int(found.image(row)[0, 0, 0]) // 20 for row in range(len(found))]

    orders = [pixels(images.draw(None, seed=seed)) for seed in range(5)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert pixels(images.draw(4, seed=2)) == orders[2][:4]
    drawn = images.draw(4, seed=2)
    assert drawn.labels.tolist() == LABELS[orders[2][:4]].tolist()
    for number in (0, 7):
        with pytest.raises(SecateurError, match=f"a.npz: {number} images wanted, it has 6"):
            images.draw(number, seed=0)


COLOUR = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (4, 5, 1)), ("1", (4, 5, 1)), ("RGB", (4, 5, 3)), ("P", (4, 5, 3)), ("CMYK", (4, 5, 3))]
)
def test_every_common_kind_of_file_is_grey_or_colour(mode: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(COLOUR).convert(mode).save(tmp_path / "a" / "x.tif")
    found = read_images(tmp_path).image(0)
    assert (found.shape, found.dtype) == (shape, np.uint8)


def test_alpha_counts_only_where_something_shines_through(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    alpha = np.full((4, 5, 1), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate((COLOUR, alpha), axis=2)).save(tmp_path / "a" / "x.png")
    assert np.array_equal(read_images(tmp_path).image(0), COLOUR)
    alpha[2, 2] = 254
    Image.fromarray(np.concatenate((COLOUR, alpha), axis=2)).save(tmp_path / "a" / "x.png")
    with pytest.raises(SecateurError, match=r"x\.png: parts of it are transparent"):
        read_images(tmp_path).image(0)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise shows it upright
    Image.fromarray(COLOUR).save(tmp_path / "a" / "x.png", exif=turned)
    assert np.array_equal(read_images(tmp_path).image(0), np.rot90(COLOUR, -1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": GREY.astype(np.float32)}, "images is float32 .6, 4, 5., expected uint8"),
        ({"images": GREY[0]}, r"images is uint8 \(4, 5\), expected uint8"),
        ({"images": GREY[..., None].repeat(4, 3)}, r"images is uint8 \(6, 4, 5, 4\), expected"),
        ({"images": GREY[..., None, None]}, r"images is uint8 \(6, 4, 5, 1, 1\), expected"),
        ({"images": GREY[:5]}, r"images \(5, 4, 5\) and 6 labels"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "and 0 labels, expected one for each, and some"),
        ({"images": GREY[:, :0]}, r"images \(6, 0, 5\)"),
        ({"labels": LABELS - 1}, "labels from -1 to 1, expected class numbers from 0"),
        ({"labels": LABELS.astype(float)}, "labels is float64 .6,., expected whole numbers"),
        ({"labels": LABELS[:, None]}, r"labels is int64 \(6, 1\), expected whole numbers"),
        ({"labels": LABELS.astype(object)}, "without pickle"),
        ({"images": np.array([GREY[0], GREY[1][:2]], dtype=object)}, "without pickle"),
    ],
)
def test_other_arrays_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=f"a.npz.*{message}"):
        read_images(arrays(tmp_path / "a.npz", **content))


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x_train=GREY)
    with pytest.raises(SecateurError, match="no array images and labels, found x_train"):
        read_images(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(arrays(tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(SecateurError, match=r"c\.npz: not a whole zip archive"):
        read_images(tmp_path / "c.npz")
    (tmp_path / "d.txt").write_text("images")
    for name, found in (("d.txt", "a file of another kind"), ("e", "not there")):
        with pytest.raises(SecateurError, match=f"{name}: {found}, expected a folder with a subfolder"):
            read_images(tmp_path / name)
    (tmp_path / "f").mkdir()
    Image.fromarray(GREY[0]).save(tmp_path / "f" / "x.png")
    with pytest.raises(SecateurError, match="f: no folders in it, expected one for every class"):
        read_images(tmp_path / "f")
    class_folder(tmp_path / "g" / "train")
    with pytest.raises(SecateurError, match=r"train/class 0: a folder in that of a class.*of several splits"):
        read_images(tmp_path / "g")
    (tmp_path / "g" / "train" / "class 1" / "2.png").write_bytes(b"no image")
    images = read_images(tmp_path / "g" / "train")
    with pytest.raises(SecateurError, match=r"2\.png: cannot be read as an image"):
        images.image(2)


def test_nothing_in_a_class_folder_is_passed_over_in_silence(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "f")
    (folder / "README.md").touch()
    (folder / ".cache").mkdir()
    for name in (".DS_Store", ".hidden.txt"):
        (folder / "class 1" / name).touch()
    assert len(read_images(folder)) == 6
    for name in ("class 1/b.heic", "class 1/a.txt", "class 2/c.png.part"):
        (folder / name).touch()
    with pytest.raises(SecateurError, match=r"f: 3 files in its folders are no images .*first is .*class 1/a\.txt"):
        read_images(folder)
    (folder / "class 2" / "more").mkdir()
    with pytest.raises(SecateurError, match="class 2/more: a folder in that of a class"):
        read_images(folder)
    (tmp_path / "g" / "a").mkdir(parents=True)
    with pytest.raises(SecateurError, match="a: no image in it"):
        read_images(tmp_path / "g")


def test_what_a_suffix_hides_reaches_no_other_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*given: object) -> None:
        raise AssertionError(f"a program would run: {given}")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    (tmp_path / "a").mkdir()
    content = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a" / "x.jpg").write_text(content)
    with pytest.raises(SecateurError, match=r"x\.jpg: cannot be read as an image"):
        read_images(tmp_path).image(0)
    Image.fromarray(COLOUR).save(tmp_path / "a" / "x.jpg", format="PNG")
    assert np.array_equal(read_images(tmp_path).image(0), COLOUR)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_accepted_suffix_is_read(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(GREY[0]).save(tmp_path / "a" / f"x{suffix.upper()}")
    assert read_images(tmp_path).image(0).shape[:2] == (4, 5)


def test_a_file_with_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(GREY[0].astype(np.uint16)).save(tmp_path / "a" / "x.png")
    with pytest.raises(SecateurError, match="an image of mode 'I;16', expected one of"):
        read_images(tmp_path).image(0)


def test_labels_beyond_the_classes_of_a_model_are_refused(tmp_path: Path) -> None:
    images = read_images(arrays(tmp_path / "a.npz"))
    images.check_labels(3)
    for found in (images, read_images(class_folder(tmp_path / "f")).take([0])):
        with pytest.raises(SecateurError, match="labels up to 2, expected 0 to 1"):
            found.check_labels(2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("class 0", "class 1", "class 2", "d"), None),
        (("a", "b", "c"), None),  # nothing in common: the names say nothing
        (("class 1", "class 2", "d"), "class folder 0 is 'class 0', but m calls class 0 'class 1'"),
        (("a", "class 2", "c"), "class folder 0 is 'class 0', but m calls class 0 'a'"),
        (("class 0", "class 1", "c"), "class folder 2 is 'class 2', but m calls class 2 'c'"),
        (("class 0", "class 1"), "labels up to 2, expected 0 to 1"),
    ],
)
def test_class_folders_named_as_those_of_a_model_are_all_of_them_in_its_order(
    names: tuple[str, ...], message: str | None, tmp_path: Path
) -> None:
    folder, stored = read_images(class_folder(tmp_path / "f")), read_images(arrays(tmp_path / "a.npz"))
    if len(names) > 2:
        stored.check_classes(names, Path("m"))
    with nullcontext() if message is None else pytest.raises(SecateurError, match=message):
        folder.check_classes(names, Path("m"))


@pytest.mark.parametrize(("folders", "in_order"), [(("8", "9", "10"), False), (("08", "09", "10"), True)])
def test_folders_with_numbers_for_names_are_in_their_order_or_refused(
    folders: tuple[str, ...], in_order: bool, tmp_path: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
        Image.fromarray(GREY[0]).save(tmp_path / name / "image.png")
    found = read_images(tmp_path)
    with (
        nullcontext()
        if in_order
        else pytest.raises(SecateurError, match="so that '8' is class 1, but the names are numbers")
    ):
        found.check_classes(("a", "b", "c"), Path("m"))
    found.check_classes(found.classes or (), Path("m"))  # a model that calls its classes so is right


def model_folder(path: Path, **changes: Any) -> Path:
    model = tiny_vmoe("token choice", **changes)
    model.save_pretrained(path)
    (path / FILE).write_text(json.dumps(default_pixels(model.config)))
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_the_size_of_the_model_go_from_minus_one_to_one(channels: int, tmp_path: Path) -> None:
    pixels = read_pixels(model_folder(tmp_path, num_channels=channels))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels), dtype=np.uint8)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    found = pixels(list(images))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_images_of_any_size_are_resized_and_grey_is_repeated_for_a_model_of_colour(tmp_path: Path) -> None:
    pixels = read_pixels(model_folder(tmp_path))
    left, grey = np.zeros((20, 30, 3), dtype=np.uint8), np.full((3, 3, 1), 51, dtype=np.uint8)
    left[:, 15:] = 255
    found = pixels([left, grey])
    assert found.shape == (2, 3, 8, 8)
    assert torch.equal(found[0, :, :, :3], torch.full((3, 8, 3), -1.0))
    assert torch.equal(found[0, :, :, 5:], torch.full((3, 8, 3), 1.0))
    torch.testing.assert_close(found[1], torch.full((3, 8, 8), 0.4 - 1))


def test_colour_is_refused_by_a_model_of_grey_images(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="an image of 3 channels, but the model takes 1"):
        read_pixels(model_folder(tmp_path, num_channels=1))([COLOUR])


def test_transformers_reads_the_file_too(tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(model_folder(tmp_path), backend="pil")
    found = processor([np.full((9, 9, 3), 255, dtype=np.uint8)], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, torch.ones(1, 3, 8, 8))


def test_a_folder_without_the_file_or_with_another_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(content | {"size": {"height": 9, "width": 9}}))
    with pytest.raises(SecateurError, match=r"makes pixels \(1, 3, 9, 9\), the model takes \(1, 3, 8, 8\)"):
        read_pixels(folder)
    (folder / FILE).write_text(json.dumps(content | {"image_processor_type": "Unknown"}))
    with pytest.raises(SecateurError, match=f"{FILE}: transformers cannot use it"):
        read_pixels(folder)
    (folder / FILE).unlink()
    with pytest.raises(SecateurError, match=rf"{FILE}: not there.*convert-vmoe"):
        read_pixels(folder)
