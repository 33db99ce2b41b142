"""The parts of a page: one HTML file with its style inside, no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from secateur.reporting.stylesheet import STYLE

Rows = Sequence[Sequence[str]]


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page; empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, content: str) -> str:
    """A heading and what stands under it; nothing where there is nothing."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def table(head: Sequence[str], rows: Rows) -> str:
    """A table whose first column names the rows. It scrolls by itself when the screen is narrower."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'
