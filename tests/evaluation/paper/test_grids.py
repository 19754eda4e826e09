from dataclasses import replace

import pytest

from art_pixeldefend.evaluation.grid import CLEAN, Row
from art_pixeldefend.evaluation.paper.grids import GRIDS, paper_accuracies, paper_accuracy


def test_the_papers_numbers_stand_beside_the_threat_they_were_measured_under():
    pixeldefend, squeezing = Row(defence="pixeldefend"), Row(defence="feature-squeezing")
    grid = GRIDS["fashion-mnist"]
    assert paper_accuracy(grid, pixeldefend, "strongest", 25) == 74
    assert paper_accuracy(grid, replace(pixeldefend, threat="white-box"), "strongest", 25) is None
    assert paper_accuracy(grid, squeezing, "bim", 8) is None
    assert paper_accuracy(grid, replace(squeezing, threat="white-box"), "bim", 8) == 56
    assert paper_accuracy(grid, squeezing, "cw", 8) == 83
    assert paper_accuracy(grid, replace(squeezing, threat="white-box"), "cw", 8) is None


@pytest.mark.parametrize(
    ("name", "eps", "delta"), [("fashion-mnist", 8, 8), ("fashion-mnist", 25, 25), ("cifar-10", 16, 8)]
)
def test_the_papers_numbers_stand_beside_the_delta_it_trained_with(name, eps, delta):
    row = Row("resnet", "adversarial-bim")
    for mine in (8, 25):
        assert (paper_accuracy(GRIDS[name], replace(row, delta=mine), "bim", eps) is not None) == (mine == delta)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar-10"])
def test_every_number_of_the_papers_tables_has_its_cell(name):
    grid = GRIDS[name]
    found = [
        (row.network, row.training, row.defence, column, eps)
        for row in grid.rows
        for column in (CLEAN, *grid.attacks_of(row), "strongest")
        for eps in grid.eps_of(row)
        if paper_accuracy(grid, row, column, eps) is not None
    ]
    papers = {key[1:] for key in paper_accuracies() if key[0] == name}
    assert len(found) == len(set(found)) and set(found) == papers


@pytest.mark.parametrize("name", GRIDS)
def test_every_defence_is_run_under_both_threats(name):
    rows = GRIDS[name].rows
    for row in rows:
        if row.defence != "none":
            threats = {
                r.threat.sees
                for r in rows
                if (r.classifier, r.defence, r.eps) == (row.classifier, row.defence, row.eps)
            }
            assert threats == {"classifier", "everything"}
