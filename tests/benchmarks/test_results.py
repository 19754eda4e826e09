"""The published tables show the numbers of the JSON files beside them."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from art_pixeldefend.evaluation import table
from art_pixeldefend.evaluation.grid import CLEAN, EARLIER_NAMES, Cell, Row
from art_pixeldefend.evaluation.paper.grids import GRIDS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TABLES = {
    "fashion-mnist": "fashion-mnist",
    "fashion-mnist-10000": "fashion-mnist",
    "fashion-mnist-neighbours": "fashion-mnist",
    "cifar-10-small": "cifar-10",
}


def stored(name):
    """The grid and the results of a table, from its JSON file."""
    cells = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
    attacks = tuple(dict.fromkeys(cell["attack"] for cell in cells if cell["attack"] != CLEAN))
    rows, results = {}, {}
    for cell in cells[::-1]:  # a row's last cell has its attacks, its first ones may stem from another table
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in cell["row"].items()}
        settings["threat"] = EARLIER_NAMES.get(settings["threat"], settings["threat"])
        row = Row(**settings)
        row = rows.setdefault((row.name, row.eps), replace(row, attacks=None) if row.attacks == attacks else row)
        results[Cell(row, cell["attack"], cell["eps"])] = cell
    images = max(cell["count"] for cell in cells)
    grid = replace(GRIDS[TABLES[name]], rows=tuple(rows.values())[::-1], attacks=attacks, images=images)
    return grid, results


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_rendered_from_the_results(name):
    grid, results = stored(name)
    text, rendered = (RESULTS / f"{name}.md").read_text(), table.markdown(grid, results)
    tables = rendered[: rendered.index("\n- Accuracy")]
    assert tables in text
    assert (RESULTS / f"{name}.csv").read_text() == table.comma_separated(grid, results)


def test_the_detection_page_shows_its_results(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent)
    page = importlib.import_module("detection").page
    result = json.loads((RESULTS / "detection.json").read_text())
    assert page(result) == (RESULTS / "detection.md").read_text()


def test_published_false_alarm_rates_are_within_the_binomial_intervals_of_their_levels():
    result = json.loads((RESULTS / "detection.json").read_text())
    found = [rate for detectors in result["false_alarms"].values() for rates in detectors.values() for rate in rates]
    assert {rate["alpha"] for rate in found} == {0.01, 0.05, 0.1} and len(result["false_alarms"]) == 2
    for rate in found:
        low, high = rate["binomial_percent"]
        assert low <= rate["rate_percent"] <= high, rate
        assert rate["splits_within_beta_binomial"] >= 0.8 * rate["splits"], rate
