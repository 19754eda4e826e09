from dataclasses import replace

import numpy as np
import pytest

from art_pixeldefend.evaluation import runner, table
from art_pixeldefend.evaluation.grid import CLEAN, Row


def results_of(grid, right):
    """Results of a grid's cells, from whether each image is right, by threat and attack."""
    return {
        cell: runner._counts(np.array([c == "1" for c in right[cell.row.threat.name, cell.attack]]))
        for cell in grid.cells()
    }


SQUEEZED = (Row("vgg", "normal", "feature-squeezing", "white-box"), Row("vgg", "normal", "feature-squeezing"))


def test_the_strongest_attack_is_the_least_of_the_row_without_clean(tiny):
    grid = replace(tiny, rows=(Row("vgg"),), eps=(16,))
    accuracies = {CLEAN: "00011", "rand": "11101", "fgsm": "01111"}
    made = results_of(grid, {("white-box", attack): right for attack, right in accuracies.items()})
    records = {record["column"]: record for record in table.entries(grid, made)}
    assert records["strongest"]["ours"] == 80 and records[CLEAN]["ours"] == 40


def test_the_worst_case_counts_images_that_are_right_without_and_with_all_attacks(tiny):
    grid = replace(tiny, rows=(Row("vgg"),), eps=(16,))
    accuracies = {CLEAN: "00011", "rand": "11101", "fgsm": "01111"}
    made = results_of(grid, {("white-box", attack): right for attack, right in accuracies.items()})
    records = {record["column"]: record for record in table.entries(grid, made)}
    assert records["worst case"]["ours"] == 20


def test_the_worst_case_of_attacks_that_see_the_defence_is_also_under_blind_ones(tiny):
    grid = replace(tiny, rows=(replace(SQUEEZED[0], images=4), SQUEEZED[1]), eps=(16,))
    right = {("white-box", CLEAN): "1111", ("white-box", "rand"): "1111", ("white-box", "fgsm"): "0111"}
    right |= {("blind", CLEAN): "11111", ("blind", "rand"): "11111", ("blind", "fgsm"): "11001"}
    made = results_of(grid, right)
    worst = {r["threat"]: r for r in table.entries(grid, made) if r["column"] == "worst case"}
    assert worst["white-box"]["ours"] == 25 and worst["white-box"]["count"] == 4
    assert worst["blind"]["ours"] == 60


def test_attacks_that_are_weaker_with_sight_of_the_defence_are_named(tiny):
    grid = replace(tiny, rows=SQUEEZED, eps=(16,))
    right = {(threat, attack): "11110" for threat in ("white-box", "blind") for attack in (CLEAN, "rand", "fgsm")}
    warned = {("white-box", "fgsm"): "11111", ("blind", "fgsm"): "11000"}
    assert "Weak attacks" not in table.markdown(grid, results_of(grid, right))
    text = table.markdown(grid, results_of(grid, right | warned))
    (line,) = (line for line in text.splitlines() if "Weak attacks" in line)
    assert "vgg/normal/feature-squeezing/white-box fgsm 16 (80.0, 40.0 blind)" in line
    assert "Weak attacks" not in table.markdown(grid, results_of(grid, right | {("white-box", "rand"): "11111"}))


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
