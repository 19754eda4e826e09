"""The published tables show the numbers of the JSON files beside them."""

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
