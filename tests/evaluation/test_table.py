from dataclasses import replace

import numpy as np
import pytest

from art_pixeldefend.evaluation import runner, table
from art_pixeldefend.evaluation.grid import CLEAN, Row


def test_the_strongest_attack_is_the_least_of_the_row_without_clean(tiny):
    grid = replace(tiny, rows=(Row("vgg"),), eps=(16,))
    accuracies = {CLEAN: "0001", "rand": "1110", "fgsm": "0111"}
    made = {cell: runner._counts(np.array([c == "1" for c in accuracies[cell.attack]])) for cell in grid.cells()}
    records = {record["column"]: record for record in table.entries(grid, made)}
    assert records["strongest"]["ours"] == 75 and records["worst case"]["ours"] == 50
    assert records[CLEAN]["ours"] == 25


def test_no_strongest_attack_is_shown_where_one_failed(tiny):
    grid = replace(tiny, rows=(Row("vgg"),), eps=(16,))
    made = {
        cell: {"error": "x"} if cell.attack == "fgsm" else runner._counts(np.ones(4, bool)) for cell in grid.cells()
    }
    assert {record["column"] for record in table.entries(grid, made)} == {CLEAN, "rand", "fgsm"}


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (83, 100, 0.7445, 0.8911)]
)
def test_wilsons_interval_has_its_known_values(correct, count, low, high):
    assert table.wilson(correct, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("threat", "noted", "other"),
    [("white-box", "upper bound", "nothing about an attacker"), ("blind", "nothing about an attacker", "upper bound")],
)
def test_tables_say_what_their_threats_do_not_show(tiny, threat, noted, other):
    text = table.markdown(replace(tiny, rows=(Row("vgg", "normal", "feature-squeezing", threat),)), {})
    assert f"- *{threat}*: " in text and noted in text and other not in text


def test_published_numbers_and_remarks_stand_in_the_table_if_the_grid_has_them(tiny):
    row = Row("vgg", "normal", "feature-squeezing")
    grid = replace(tiny, rows=(row,), eps=(16,), paper=lambda grid, row, column, eps: 70.0, notes={row.defence: "odd"})
    made = {cell: runner._counts(np.array([True, False])) for cell in grid.cells()}
    text = table.markdown(grid, made)
    assert "**50.0** (70, -20.0)" in text and "- feature-squeezing: odd." in text
    alone = table.markdown(replace(grid, paper=None, notes={}), made)
    assert "| **50.0** |" in alone and "paper" not in alone and "odd" not in alone
