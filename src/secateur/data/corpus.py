"""Which documents does a data spec name, and what is their text?"""

from __future__ import annotations

import glob
import importlib
import io
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.json import parse_json
from secateur.files.limits import MAX_JSON
from secateur.files.opened import opened

Texts = Iterator[tuple[str, str]]  # (text, source)
HUB_PREFIX = "hf:"
INSTALL_DATASETS = 'pip install "secateur[datasets]"'
STDLIB = "embedded:stdlib"
TOPICS = "embedded:topics"
# pydoc_data is the prose domain; as Python source it would be a second copy of the same text inside one string.
NOT_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "pydoc_data"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text: the unit of de-duplication, of the train/validation split and of packing."""

    text: str
    source: str
    domain: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    spec: str
    domain: str
    texts: Callable[[], Texts]


def embedded_specs() -> tuple[str, ...]:
    """Specs that need no file: the running interpreter's own standard library (code) and its reference prose."""
    return (f"code={STDLIB}", f"prose={TOPICS}")


def read_documents(
    specs: Sequence[str], *, text_key: str = "text", split: str = "train", skipped: list[str] | None = None
) -> Iterator[Document]:
    """Read the documents that `specs` name, in a fixed order; `embedded_specs()` when there is none.

    A spec is a file, a folder (recursive, without hidden names), a glob, or `hf:NAME` / `hf:OWNER/NAME` /
    `hf:OWNER/NAME/CONFIG` for the `datasets` library, each optionally after `domain=`. A path that exists is always
    that path. The default domain is the stem of the file, or the name of the folder (of a glob: its fixed folder).

    Every spec is resolved during this call; text is read only as the iterator advances. Documents without any text
    are left out. `text_key` names the text in .jsonl lines, .parquet rows and datasets; `split` is the split of a
    dataset. `skipped` collects the standard library files that cannot be decoded even by their PEP 263 cookie (test
    files that are broken on purpose); no other file is ever skipped for its content.

    Raises:
        SecateurError: a spec names nothing readable, or a file is empty, not UTF-8, not valid JSON, without the text
            key, or with a text that is not a string (some only when the iterator gets there).
    """
    if isinstance(specs, str):
        raise SecateurError(f"data specs: found the single string {specs!r}, expected a list of specs")
    skipped = [] if skipped is None else skipped
    places = [_resolve(spec, text_key, split, skipped) for spec in specs or embedded_specs()]
    return (document for place in places for document in _documents(place))


def _documents(place: _Place) -> Iterator[Document]:
    num_found = 0
    for text, source in place.texts():
        if text and not text.isspace():
            num_found += 1
            yield Document(text=text, source=source, domain=place.domain)
    if num_found == 0:
        raise SecateurError(f"data {place.spec!r}: found no text, expected at least one document that is not blank")


def _resolve(spec: str, text_key: str, split: str, skipped: list[str]) -> _Place:
    domain, location = _split_domain(spec)
    path = Path(location).expanduser()
    if not path.exists():
        if location == STDLIB:
            return _Place(spec=spec, domain=domain or "code", texts=partial(_stdlib_files, skipped))
        if location == TOPICS:
            return _Place(spec=spec, domain=domain or "prose", texts=_reference_topics)
        if location.startswith(HUB_PREFIX):
            return _hub_place(spec, domain, location.removeprefix(HUB_PREFIX), text_key, split)
    files, stem = _matching_files(spec, path)
    readable = [file for file in files if file.suffix.lower() in READERS]
    if not readable:
        raise SecateurError(f"data {spec!r}: found {len(files)} files, expected at least one that ends in {KINDS}")
    if any(file.suffix.lower() == ".parquet" for file in readable):
        _optional_module("pyarrow.parquet", spec)
    return _Place(spec=spec, domain=domain or stem or "data", texts=partial(_file_texts, readable, text_key))


def _hub_place(spec: str, domain: str | None, name: str, text_key: str, split: str) -> _Place:
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise SecateurError(f"data {spec!r}: expected hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG")
    repository, config = parts[:2], parts[2] if len(parts) == 3 else None
    datasets = _optional_module("datasets", spec)
    texts = partial(_dataset_rows, datasets, "/".join(repository), config, split, text_key)
    return _Place(spec=spec, domain=domain or repository[-1], texts=texts)


def _matching_files(spec: str, path: Path) -> tuple[list[Path], str]:
    """The files that `path` (a file, a folder or a glob) names, and the domain they have by default."""
    if path.is_dir():
        return _files_under(path), path.resolve().name
    if path.exists():
        return [_explicit_file(path)], path.stem
    if glob.has_magic(str(path)):
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        names = sorted(glob.glob(str(path), recursive=True))
        return [Path(name) for name in names if os.path.isfile(name)], fixed.resolve().name
    raise SecateurError(
        f"data {spec!r}: no such file or folder; expected a file, a folder, a glob, "
        f"or {HUB_PREFIX}NAME for a dataset of the `datasets` library"
    )


def _split_domain(spec: str) -> tuple[str | None, str]:
    """`domain=location` as two parts; a path that exists as a whole (such as a folder `lang=en`) has no domain."""
    if not spec.strip():
        raise SecateurError(f"data spec: found {spec!r}, expected a file, a folder, a glob or a dataset")
    matched = re.fullmatch(r"([^/\\=\s]+)=(.+)", spec, flags=re.DOTALL)
    if matched is None or Path(spec).exists():
        return None, spec
    return matched[1], matched[2]


def _explicit_file(path: Path) -> Path:
    if not path.is_file():
        raise SecateurError(f"data file {path}: neither a regular file nor a folder")
    if path.suffix.lower() not in READERS:
        raise SecateurError(f"data file {path}: found the extension {path.suffix!r}, expected one of {KINDS}")
    if path.stat().st_size == 0:
        raise SecateurError(f"data file {path}: found 0 bytes, expected text")
    return path


def _files_under(folder: Path) -> list[Path]:
    """All files below `folder` in sorted order, each real folder once, so that links cannot make a loop."""
    files: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _cannot_list(error: OSError) -> None:
    raise SecateurError(f"data folder {error.filename}: cannot be listed ({error.strerror})") from error


def _optional_module(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise SecateurError(
            f"data {spec!r}: {package} is not installed; install it with: {INSTALL_DATASETS}"
        ) from error


def _file_texts(files: Sequence[Path], text_key: str) -> Texts:
    for file in files:
        try:
            yield from READERS[file.suffix.lower()](file, text_key)
        except OSError as error:
            raise SecateurError(f"data file {file}: cannot be read ({error.strerror or error})") from error


def _whole_file(path: Path, text_key: str) -> Texts:
    with opened(path, where=f"data file {path}") as file:
        yield _decode(file.read(), str(path)), str(path)


def _json_lines(path: Path, text_key: str) -> Texts:
    with opened(path, where=f"data file {path}") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON + 1), b""), start=1):
            source = f"{path}:{number}"
            text = _decode(line, source)
            if not text or text.isspace():
                continue
            row = parse_json(text, source)
            if not isinstance(row, dict):
                raise SecateurError(f"{source}: found a JSON {type(row).__name__}, expected an object")
            if "messages" in row and text_key not in row:
                raise SecateurError(
                    f"{source}: found chat 'messages', expected one string under the key {text_key!r}; chats are read "
                    "by observe, prune and eval, from a spec that names files of chats only"
                )
            _check_key(text_key, list(row), source)
            yield _checked_text(row[text_key], text_key, source), source


def _parquet_rows(path: Path, text_key: str) -> Texts:
    parquet = _optional_module("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            _check_key(text_key, file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    source = f"{path}:{number}"
                    yield _checked_text(text, text_key, source), source
                    number += 1
    except SecateurError:
        raise
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise SecateurError(f"data file {path}: not a readable parquet file ({error})") from error


def _dataset_rows(datasets: Any, name: str, config: str | None, split: str, text_key: str) -> Texts:
    found = f"dataset {name!r}, configuration {config!r}, split {split!r}"
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets and the HTTP clients below it have error classes of their own
        raise SecateurError(f"{found}: cannot be loaded ({error})") from error
    _check_key(text_key, list(rows.column_names), found)
    for number, row in enumerate(rows.select_columns([text_key])):
        source = f"{HUB_PREFIX}{name}:{number}"
        yield _checked_text(row[text_key], text_key, source), source


def _stdlib_files(skipped: list[str]) -> Texts:
    """The .py files of the standard library; links are not followed, so nothing outside it and nothing twice."""
    root = Path(sysconfig.get_path("stdlib"))
    for parent, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if name not in NOT_STDLIB_FOLDERS)
        for path in (Path(parent, name) for name in sorted(names) if name.endswith(".py")):
            if path.is_symlink():
                continue
            source = f"stdlib/{path.relative_to(root).as_posix()}"
            data = path.read_bytes()
            try:
                encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
                text = data.decode(encoding)
                text.encode("utf-8")  # an escape codec can make lone surrogates
            except (SyntaxError, ValueError, LookupError):
                skipped.append(source)
                continue
            yield text, source


def _reference_topics() -> Texts:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise SecateurError("data: this Python has no pydoc_data.topics; name your own data instead") from error
    for name, text in sorted(topics.items()):
        yield text, f"pydoc_data.topics/{name}"


READERS: dict[str, Callable[[Path, str], Texts]] = {
    ".txt": _whole_file,
    ".md": _whole_file,
    ".py": _whole_file,
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}
KINDS = " ".join(READERS)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{source}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}), expected UTF-8 text"
        ) from error


def _check_key(text_key: str, keys: Sequence[str], source: str) -> None:
    if text_key not in keys:
        raise SecateurError(f"{source}: found the keys {sorted(keys)}, expected the text under {text_key!r}")


def _checked_text(value: object, text_key: str, source: str) -> str:
    if not isinstance(value, str):
        raise SecateurError(f"{source}: found {type(value).__name__} under {text_key!r}, expected a string")
    return value
