"""Write the report of a run folder into that folder."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.files.atomic import atomic_write
from secateur.reporting.gallery import gallery
from secateur.reporting.numbers import report_json
from secateur.reporting.page import render
from secateur.reporting.run_data import read_run
from secateur.reporting.theme import LIGHT, THEMES, png


def write_report(run_folder: Path) -> Path:
    """Read a run folder, finished or not, and write report.html, report.json and figures/*.png into it.

    The PNG files are the light figures; the page holds the dark ones as well. Each file is replaced whole, and the
    same run folder gives the same files.

    Returns:
        The path of report.html.

    Raises:
        SecateurError: no run folder, or a file in it that is malformed or contradicts another.
        OSError: the folder cannot be written.
    """
    run = read_run(run_folder)
    entries = gallery(run)
    images = {(entry.name, theme.name): png(entry.draw(theme)) for entry in entries for theme in THEMES}
    page = render(run, entries, images)
    numbers = json.dumps(report_json(run), indent=2, allow_nan=False, ensure_ascii=False)
    (run_folder / "figures").mkdir(exist_ok=True)
    for entry in entries:
        atomic_write(run_folder / "figures" / f"{entry.name}.png", images[entry.name, LIGHT.name])
    atomic_write(run_folder / "report.json", numbers + "\n")
    atomic_write(run_folder / "report.html", page)
    return run_folder / "report.html"
