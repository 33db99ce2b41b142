"""The wheel and the sdist: built from the tree, installed elsewhere, used without the tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from secateur.version import __version__
from support.long_tests import long
from support.model_folders import plan_of, saved

pytestmark = [pytest.mark.slow, pytest.mark.process]

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "secateur"
COPIED = "modeling_secateur.py"
UNEVEN = plan_of((0, [0, 2, 3, 5]), (1, [1, 4, 6]))

LOAD_WITHOUT_SECATEUR = """
import json, sys
sys.modules["secateur"] = None  # importing it fails from here on
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
experts = [len(layer.mlp.experts.down_proj) for layer in model.model.layers]
with torch.no_grad():
    logits = model(input_ids=torch.arange(8)[None]).logits
print(json.dumps([type(model).__name__, experts, bool(logits.isfinite().all())]))
"""


def run(command: list[str | Path], cwd: Path) -> str:
    """What a command prints that knows neither this tree nor the editable install of the test environment."""
    cleared = {"PYTHONPATH": "", "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | cleared)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def files_below(folder: Path) -> set[str]:
    """Paths relative to the folder; hidden files and caches are left out."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(out / f"secateur-{__version__}.tar.gz") as archive:
        archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return out / f"secateur-{__version__}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip builds it from the tree, with the build backend of the test environment."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, cwd=out)
    return out / f"secateur-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it, which sees the packages of the test environment.

    A .pth file names their folders; .pth files in those folders are not read, so no editable install wins.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "test_environment.pth").write_text("\n".join(packages))
    return folder


def test_the_wheel_holds_every_file_of_the_source_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name.removeprefix("secateur/") for name in names if name.startswith("secateur/")}
    assert {"py.typed", COPIED} <= package
    assert package == files_below(SOURCE)
    about = f"secateur-{__version__}.dist-info"
    assert names - {f"secateur/{name}" for name in package} == {
        f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_sdist_holds_what_its_tests_read(sdist: Path) -> None:
    found = files_below(sdist)
    for folder in ("src", "tests", "docs", "benchmarks", "examples"):
        assert {name for name in found if name.startswith(f"{folder}/")} == {
            f"{folder}/{name}" for name in files_below(ROOT / folder)
        }
    top = {name for name in found if "/" not in name}
    assert {"CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "PKG-INFO"} <= top
    assert {name for name in top if name.endswith(".md")} == {path.name for path in ROOT.glob("*.md")} >= {"README.md"}


def test_python_imports_the_package_of_the_new_environment_and_its_metadata_agree(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import json, pathlib, secateur, importlib.metadata as m; d = m.distribution('secateur');"
        "print(json.dumps([secateur.__file__, secateur.__version__, d.version, str(d.locate_file('secateur')),"
        " [e.value for e in d.entry_points]]))"
    )
    file, version, stated, place, entries = json.loads(run([installed / "bin/python", "-c", code], tmp_path))
    assert Path(file).is_relative_to(installed)
    assert Path(file).parent == Path(place)
    assert version == stated == __version__
    assert entries == ["secateur.__main__:main"]


def test_the_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    assert run([installed / "bin/secateur", "--version"], tmp_path) == __version__


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    torch.manual_seed(0)
    saved("olmoe", folder)
    return folder


@long  # what `apply` does below begins with it
def test_the_command_inspects_a_model_folder(installed: Path, source: Path, tmp_path: Path) -> None:
    assert "olmoe" in run([installed / "bin/secateur", "inspect", source], tmp_path)


@pytest.fixture(scope="module")
def pruned(installed: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("applied")
    UNEVEN.save(folder / "plan.json")
    run([installed / "bin/secateur", "apply", source, "plan.json", "--out", "pruned"], folder)
    return folder / "pruned"


def test_a_folder_of_different_layers_carries_the_model_file_of_the_wheel_which_is_that_of_the_source(
    installed: Path, pruned: Path
) -> None:
    """tests/test_saved_models.py loads folders with that of the source where there is no Secateur."""
    (site,) = installed.glob("lib/python*/site-packages")
    assert (pruned / COPIED).read_bytes() == (site / "secateur" / COPIED).read_bytes() == (SOURCE / COPIED).read_bytes()
    assert json.loads((pruned / "config.json").read_text())["architectures"] == ["PrunedOlmoeForCausalLM"]


@long
def test_such_a_folder_loads_without_secateur(installed: Path, pruned: Path, tmp_path: Path) -> None:
    found = json.loads(run([installed / "bin/python", "-c", LOAD_WITHOUT_SECATEUR, pruned], tmp_path))
    assert found == ["PrunedOlmoeForCausalLM", [4, 3, 8], True]
