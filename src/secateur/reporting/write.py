"""Write the report of a run folder into that folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from secateur.files.atomic import atomic_write
from secateur.files.given import StrPath, check_given
from secateur.files.progress import OnStage, stage
from secateur.reporting.gallery import gallery
from secateur.reporting.numbers import report_json
from secateur.reporting.page import render
from secateur.reporting.run_data import read_run
from secateur.reporting.theme import LIGHT, THEMES, png
from secateur.results import Result


@dataclass(frozen=True, kw_only=True)
class RunReport(Result):
    """What `report` wrote. page: report.html. numbers: report.json. figures: PNG files."""

    page: Path
    numbers: Path
    figures: tuple[Path, ...]


def report(run: StrPath, *, on_progress: OnStage | None = None) -> RunReport:
    """Write report.html, report.json and figures/*.png of a run of `pretrain` into its folder.

    The PNG files are the light figures; the page holds the dark ones as well. Each file is replaced whole, and the
    same run folder gives the same files.

    Args:
        run: its folder, finished or not.
        on_progress: called with ("drawing", figures drawn, figures to draw).

    Returns:
        Where they are; `to_json` is what report.json says.

    Raises:
        SecateurError: no run folder, or a file in it that is malformed or contradicts another.
        OSError: the folder cannot be written.

    Example:
        >>> secateur.report("run").page
        PosixPath('run/report.html')
    """
    check_given(report, locals())
    folder, on_figure = Path(run), stage("drawing", on_progress)
    data = read_run(folder)
    entries = gallery(data)
    images: dict[tuple[str, str], bytes] = {}
    for done, entry in enumerate(entries, start=1):
        images |= {(entry.name, theme.name): png(entry.draw(theme)) for theme in THEMES}
        on_figure(done, len(entries))
    page = render(data, entries, images)
    content = report_json(data)
    numbers = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    figures = {folder / "figures" / f"{entry.name}.png": images[entry.name, LIGHT.name] for entry in entries}
    (folder / "figures").mkdir(exist_ok=True)
    for path, image in figures.items():
        atomic_write(path, image)
    atomic_write(folder / "report.json", numbers + "\n")
    atomic_write(folder / "report.html", page)
    return RunReport(
        page=folder / "report.html", numbers=folder / "report.json", figures=tuple(figures), content=content
    )
