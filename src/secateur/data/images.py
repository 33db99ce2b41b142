"""Images with class labels: a folder with one subfolder a class, or an .npz file with arrays `images` and `labels`."""

from __future__ import annotations

import hashlib
import math
import tokenize
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from secateur.errors import SecateurError
from secateur.files.archive import DAMAGED, members_of
from secateur.files.opened import opened

Pixels8: TypeAlias = NDArray[np.uint8]
# suffix -> the reader of Pillow, which goes by the content: it is offered no others, some of which start programs
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF",
           ".tiff": "TIFF", ".webp": "WEBP", ".ppm": "PPM", ".pgm": "PPM"}  # fmt: skip
# mode of an image file -> the one it is read in: grey or colour, 8 bits
MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB",
         "CMYK": "RGB", "YCbCr": "RGB"}  # fmt: skip


HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MAX_PIXELS = 40_000_000  # of an image file, whatever it says: a pixel takes six bytes while it is read


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """N images, read when they are asked for.

    Args:
        name: of where they come from, for messages. labels: (N,) int64, from 0. classes: names in the order of the
            labels, where they are known. image: number -> uint8 (H, W, C), C 1 or 3; sizes and C may differ.
    """

    name: str
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None
    image: Callable[[int], Pixels8]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Images:
        """Those of these numbers, in this order, numbered anew."""
        kept = list(rows)
        return Images(
            name=self.name, labels=self.labels[kept], classes=self.classes, image=lambda row: self.image(kept[row])
        )

    def draw(self, number: int | None, *, seed: int) -> Images:
        """`number` of them, all without it, in random order and none twice.

        Raises:
            SecateurError: there are not so many.
        """
        if number is not None and not 1 <= number <= len(self):
            raise SecateurError(f"{self.name}: {number} images wanted, it has {len(self)}")
        return self.take(np.random.default_rng(seed).permutation(len(self))[:number].tolist())

    @property
    def num_classes(self) -> int:
        """Those that have a name, or else those that the labels need."""
        return int(self.labels.max()) + 1 if self.classes is None else len(self.classes)

    def check_labels(self, num_classes: int) -> None:
        """Raises SecateurError: a label that a model of so many classes does not know."""
        if self.num_classes > num_classes:
            raise SecateurError(
                f"{self.name}: labels up to {self.num_classes - 1}, expected 0 to {num_classes - 1}: the model knows "
                f"{num_classes} classes"
            )

    def check_classes(self, names: Sequence[str], model: Path) -> None:
        """Check that a model whose classes have these names means the same by a label.

        Where no class here has a name of the model's, names say nothing, and labels are taken as they are.

        Raises:
            SecateurError: a label that the model does not know, or one that stands for another class there; folders
                with numbers for names that are not in the order of the numbers.
        """
        self.check_labels(len(names))
        if self.classes is None:
            return
        if set(self.classes).isdisjoint(names):
            if all(map(str.isdecimal, self.classes)) and sorted(self.classes, key=int) != list(self.classes):
                raise SecateurError(
                    f"{self.name}: class folders are taken by name, so that {self.classes[1]!r} is class 1, but the "
                    "names are numbers in another order; begin the shorter ones with zeros"
                )
            return
        for label, (mine, its) in enumerate(zip(self.classes, names, strict=False)):
            if mine != its:
                raise SecateurError(
                    f"{self.name}: class folder {label} is {mine!r}, but {model} calls class {label} {its!r}; where "
                    "folders are named as its classes, expected one for each, in its order"
                )

    def digest(self) -> str:
        """sha256 (hex) of all pixels and labels in their order, whatever file they come from."""
        digest = hashlib.sha256()
        for row, label in enumerate(self.labels.tolist()):
            pixels = self.image(row)
            digest.update(f"{label} {pixels.shape}".encode())
            digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest()


def read_images(path: Path) -> Images:
    """The images of a folder or an .npz file.

    A folder has a subfolder for every class, numbered by the order of their names, with its images, which come in the
    order of theirs, and nothing else that is not hidden. An .npz file holds `images`, uint8 (N, H, W) or (N, H, W, 1 or
    3), and `labels`, (N,) whole numbers from 0. Nothing pickled is read.

    Raises:
        SecateurError: neither of the two, no image, or arrays of another kind; an image that cannot be read says so
            when it is asked for.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix != ".npz" or not path.is_file():
        found = "a file of another kind" if path.exists() else "not there"
        raise SecateurError(f"{path}: {found}, expected a folder with a subfolder for every class, or an .npz file")
    return _of_arrays(path)


def _of_folder(path: Path) -> Images:
    folders = sorted(
        (entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."), key=lambda entry: entry.name
    )
    if not folders:
        raise SecateurError(f"{path}: no folders in it, expected one for every class")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        here = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
        if not here:
            raise SecateurError(f"{folder}: no image in it, expected those of a class")
        files += here
        labels += [label] * len(here)
    _check_suffixes(path, files)
    return Images(
        name=str(path),
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(folder.name for folder in folders),
        image=lambda row: _read(files[row]),
    )


def _check_suffixes(path: Path, files: Sequence[Path]) -> None:
    others = [file for file in files if file.suffix.lower() not in FORMATS]
    if nested := next((file for file in others if file.is_dir()), None):
        raise SecateurError(
            f"{nested}: a folder in that of a class, where only images are expected; of several splits, such as train "
            "and test, name one"
        )
    if others:
        raise SecateurError(
            f"{path}: {len(others)} files in its folders are no images ({' '.join(FORMATS)}), the first is "
            f"{others[0]}; take them out"
        )


def _read(file: Path) -> Pixels8:
    try:
        with opened(file) as data, Image.open(data, formats=sorted(set(FORMATS.values()))) as image:
            if image.mode not in MODES:
                raise SecateurError(f"{file}: an image of mode {image.mode!r}, expected one of {', '.join(MODES)}")
            if math.prod(image.size) > MAX_PIXELS:
                width, height = image.size
                raise SecateurError(
                    f"{file}: {width} x {height} pixels, expected at most {MAX_PIXELS} in all; make it smaller first"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data and upright.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise SecateurError(f"{file}: parts of it are transparent; put it on a background first")
            pixels = np.asarray(upright.convert(MODES[upright.mode]))
    except (*DAMAGED, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, SecateurError):
            raise
        raise SecateurError(f"{file}: cannot be read as an image ({type(error).__name__}: {error})") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _of_arrays(path: Path) -> Images:
    images, labels = _arrays(path)
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (1,), (3,)):
        raise SecateurError(
            f"{path}: images is {images.dtype} {images.shape}, expected uint8 (N, H, W) or (N, H, W, 1 or 3)"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise SecateurError(f"{path}: labels is {labels.dtype} {labels.shape}, expected whole numbers (N,)")
    if len(images) != len(labels) or not images.size:
        raise SecateurError(f"{path}: images {images.shape} and {len(labels)} labels, expected one for each, and some")
    if int(labels.min()) < 0 or int(labels.max()) > np.iinfo(np.int32).max:
        raise SecateurError(f"{path}: labels from {labels.min()} to {labels.max()}, expected class numbers from 0")
    pixels = images if images.ndim == 4 else images[..., None]
    return Images(name=str(path), labels=labels.astype(np.int64), classes=None, image=lambda row: pixels[row])


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    with opened(path) as file:
        archive, members = members_of(file, str(path))
        missing = [name for name in ("images", "labels") if f"{name}.npy" not in members]
        if missing:
            found = ", ".join(name.removesuffix(".npy") for name in members)
            raise SecateurError(f"{path}: no array {' and '.join(missing)}, found {found}")
        images, labels = (_array(archive, members[f"{name}.npy"], f"{path}: {name}") for name in ("images", "labels"))
        return images, labels


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    """An array of numbers; its header is compared with what the archive holds before there is room for it."""
    try:
        packed: Any
        with archive.open(member) as packed:
            header = HEADERS.get(np.lib.format.read_magic(packed))
            if header is None:
                raise SecateurError("a form that arrays of numbers do not have")
            shape, by_columns, dtype = header(packed)
            length = math.prod(shape) * dtype.itemsize
            if dtype.kind not in "biufc" or any(size < 0 for size in shape):
                raise SecateurError(f"{dtype} {shape}, expected numbers")
            if length != member.file_size - packed.tell():
                raise SecateurError(f"{dtype} {shape}, but there are {member.file_size - packed.tell()} bytes of it")
            array: NDArray[Any] = np.empty(length, dtype=np.uint8)
            view, done = array.data, 0
            while count := packed.readinto(view[done:]):
                done += count
    except (*DAMAGED, OSError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise SecateurError(f"{where} cannot be read as an array without pickle ({error})") from error
    if done != length:
        raise SecateurError(f"{where}: {done} of {length} bytes; it is truncated")
    return array.view(dtype).reshape(shape, order="F" if by_columns else "C")
