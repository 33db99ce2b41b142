"""The report: what it writes, says and draws."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from secateur.errors import SecateurError
from secateur.plans import LayerPlan, Plan
from secateur.reporting.figures_loads import cut_figure
from secateur.reporting.numbers import chosen_layers
from secateur.reporting.run_data import read_run
from secateur.reporting.theme import LIGHT
from secateur.reporting.words import change, count, memory
from secateur.reporting.write import report as write_report
from support.run_folders import STEP_TOKENS, lines_of, make_run, run_json, tiny_run, two_events, write_json

pytestmark = pytest.mark.filterwarnings("error")


def read_report(folder: Path) -> dict[str, Any]:
    write_report(folder)

    def refuse(name: str) -> None:
        raise AssertionError(f"report.json holds {name}")

    report: dict[str, Any] = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return report


class _Page(HTMLParser):
    """Collects what a page refers to, and fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: dict[str, dict[str, str | None]] = {}
        self.seen: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "img":
            self.images[values["id"] or ""] = values
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "pruned", num_layers=2)
    assert write_report(folder).page == folder / "report.html"
    return folder


def test_the_page_holds_every_figure_and_asks_the_network_for_nothing(pruned: Path) -> None:
    text = (pruned / "report.html").read_text()
    page = _Page(text)
    pictures = {path.stem: path.read_bytes() for path in (pruned / "figures").glob("*.png")}
    assert set(pictures) == {"loss", "load_over_time", "cut_1", "experts_kept", "cost", "rank_loads"}
    assert page.images.keys() == pictures.keys()
    for name, picture in pictures.items():
        assert page.images[name]["src"] == "data:image/png;base64," + base64.b64encode(picture).decode()
        assert len(page.images[name]["alt"] or "") > 30
    assert len(set(page.links)) == 2 * len(pictures) + 1, "light and dark of each figure, and an empty icon"
    assert all(link.startswith("data:") for link in page.links)
    assert "url(" not in text
    assert "@import" not in text


def test_words_from_the_run_are_text_never_markup(pruned: Path) -> None:
    text = (pruned / "report.html").read_text()
    assert "script" not in _Page(text).seen
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Some &lt;fast&gt; CPU &amp; more" in text


def test_report_json_of_a_pruned_run_with_a_control(pruned: Path) -> None:
    report = json.loads((pruned / "report.json").read_text())
    (record,) = json.loads((pruned / "events.json").read_text())
    (event,) = report["events"]
    assert event == {k: v for k, v in record.items() if k not in ("plan", "loads")} | {"criterion": "laep"}
    assert event["experts_before"] == 32
    assert event["parameters_before"] - event["parameters_after"] == 40_000 * (32 - event["experts_after"])
    summary = json.loads((pruned / "summary.json").read_text())
    control = json.loads((pruned / "control" / "summary.json").read_text())
    assert report["finished"] is True
    assert report["validation_loss"] == summary["validation_loss"]
    assert report["validation_loss_by_domain"] == summary["validation_loss_by_domain"]
    assert report["tokens_per_second"] == {"before": 16040.0, "after": 19150.0}
    assert report["control"]["validation_loss"] == control["validation_loss"]
    assert report["control"]["tokens_per_second"] == 16040.0
    assert report["control"]["difference"] == pytest.approx(0.02, abs=1e-12)
    assert report["control"]["compared_at_tokens"] == 600 * STEP_TOKENS
    assert report["versions"] == {"secateur": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"}
    assert report["hardware"]["cores"] == 2
    assert "0.020 worse (higher)" in (pruned / "report.html").read_text()


def test_nothing_but_the_report_is_left_in_the_folder(pruned: Path) -> None:
    written = {"report.html", "report.json", "figures"}
    read = {"run.json", "metrics.jsonl", "loads.jsonl", "events.json", "summary.json", "control"}
    assert {path.name for path in pruned.iterdir()} == written | read


@pytest.mark.slow
def test_a_run_that_is_not_finished_and_not_pruned_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "young", prunings=(), control=False, finished=False, num_layers=1, steps=160)
    report = read_report(folder)
    text = (folder / "report.html").read_text()
    assert "This run is not finished" in text
    assert "No expert has been dropped so far: all 16 experts are in place." in text
    assert not (folder / "figures" / "cut_1.png").exists()
    assert (report["finished"], report["events"], report["control"]) == (False, [], None)
    rates = [json.loads(line)["tokens_per_second"] for line in lines_of(folder / "metrics.jsonl") if "learning" in line]
    assert report["tokens_per_second"] == {"before": median(rates[1:]), "after": None}
    assert report["validation_loss"] == json.loads(lines_of(folder / "metrics.jsonl")[5])["validation_loss"]


def test_a_run_that_has_logged_nothing_yet_gets_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    write_json(folder / "run.json", run_json(1000, {1: 4}))
    report = read_report(folder)
    assert report["validation_loss"] is None
    assert report["balance"] == {}
    assert report["balance_left_out"] == dict.fromkeys("248", "no loads are recorded yet")
    assert "No validation has been logged." in (folder / "report.html").read_text()


def test_limits_are_drawn_only_where_they_are_numbers(tmp_path: Path) -> None:
    loads = [[1, 9, 2, 8, 7, 3, 6, 0]]
    drawn = {}
    for alpha, beta in ((0.4, 0.1), (None, 0.1), (0.4, "inf"), (None, None)):
        event = two_events()[0] | {"alpha": alpha, "beta": beta, "loads": {"0": loads[0]}}
        (read,) = read_run(tiny_run(tmp_path / f"{alpha}{beta}", loads, events=[event])).events
        axes = cut_figure(read, LIGHT).axes
        drawn[alpha, beta] = [text.get_text() for axis in axes for text in axis.texts]
    assert drawn == {
        (0.4, 0.1): ["0", "alpha = 0.4", "beta = 0.1"],
        (None, 0.1): ["0", "beta = 0.1"],
        (0.4, "inf"): ["0", "alpha = 0.4"],
        (None, None): ["0"],
    }


def test_the_cut_is_one_line_only_where_the_idlest_go(tmp_path: Path) -> None:
    loads, lines = [[1, 9, 2, 8, 7, 3, 6, 5]], []
    for order in ((7, 6, 4, 3, 1), (0, 2, 5)):
        plan = Plan(layers={0: LayerPlan(experts_before=8, order=order)}, criterion="laep")
        layer = {"experts_before": 8, "experts_after": len(order), "dropped": plan.layers[0].dropped}
        event = two_events()[0] | {"plan": plan.to_json(), "layers": {"0": layer | {"rerouted_share": 0.5}}}
        (read,) = read_run(tiny_run(tmp_path / f"{len(order)}", loads, events=[event])).events
        dashed = [line for line in cut_figure(read, LIGHT).axes[0].lines if line.is_dashed()]
        lines.append([np.asarray(line.get_xdata()).tolist() for line in dashed])
    assert lines == [[[3.5, 3.5]], []]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"no run\.json found"):
        write_report(tmp_path)


def test_numbers_in_words() -> None:
    space, minus = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
    assert [count(value) for value in (0, 9876, 16040.0, 3_876_224, 1.512e12)] == [
        "0",
        "9,876",
        f"16.0{space}k",
        f"3.88{space}M",
        f"1.51{space}T",
    ]
    assert memory(14.8 * 2**20) == f"14.8{space}MiB"
    assert change(200, 150) == f"{minus}25.0{space}%"


def test_a_deep_model_is_shown_by_eight_layers_with_the_first_and_the_last() -> None:
    layers = chosen_layers(list(range(3, 106)))
    assert (len(layers), layers[0], layers[-1]) == (8, 3, 105)
    assert chosen_layers([0, 2, 5]) == [0, 2, 5]
