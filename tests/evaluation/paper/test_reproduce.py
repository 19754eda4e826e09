import json
from dataclasses import replace

import pytest

from art_pixeldefend import datasets
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.paper import ascent, drawing
from art_pixeldefend.evaluation.paper.grids import GRIDS
from art_pixeldefend.evaluation.paper.reproduce import reproduce
from art_pixeldefend.evaluation.runner import Outcome, run
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import entries


def test_starts_without_a_row_for_figure_5_are_refused_before_the_work_is_done(tmp_path, tiny):
    with pytest.raises(ValueError, match="starts"):
        reproduce(tiny, tmp_path, starts=2)
    assert not list(tmp_path.iterdir())


def test_figures_of_the_images_that_they_compare_with_are_refused_before_any_work(tmp_path, tiny):
    grid = replace(tiny, rows=(Row("vgg", "normal", "pixeldefend"),), images=201)
    with pytest.raises(ValueError, match=r"^images of vgg/normal/pixeldefend/blind must be at most 200"):
        reproduce(grid, tmp_path)
    assert not list(tmp_path.iterdir())
    drawing.check_reference(Stages(replace(grid, reference="training"), datasets.load("digits"), Store(tmp_path)))


def test_a_grid_draws_figure_5_if_it_is_told_how_many_starts(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(ascent, "ascend", lambda pixel_cnn, x, *args, **kwargs: (x, 1, "ended"))
    grid = replace(tiny, rows=(Row("vgg", "normal", "pixeldefend"),), eps=(8, 40), attacks=("fgsm",), images=4, steps=2)
    reproduce(grid, tmp_path, starts=2, verbose=False)
    numbers = json.loads((tmp_path / "figures" / "figure5.json").read_text())
    assert (numbers["images"], numbers["starts"], numbers["eps_attack"]) == (4, 2, 8)
    assert (tmp_path / "figures" / "figure5.png").is_file()


def test_the_table_of_another_grid_is_replaced_only_if_told_to(tmp_path, monkeypatch, tiny):
    def write(stages, **_):
        (stages.store.folder / "table.md").write_text("")
        return Outcome("table", {}), []

    monkeypatch.setattr("art_pixeldefend.evaluation.paper.reproduce.table_and_figures", write)
    (tmp_path / "table").mkdir()
    for _ in range(2):  # the second time, it resumes
        reproduce(tiny, tmp_path / "table")
    with pytest.raises(ValueError, match=r"table.*another grid.*overwrite=True"):
        reproduce(tiny, tmp_path / "table", limit=1)
    reproduce(tiny, tmp_path / "table", limit=1, dry_run=True)
    reproduce(tiny, tmp_path / "table", limit=1, overwrite=True)
    reproduce(tiny, tmp_path / "table", limit=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("mine")
    with pytest.raises(ValueError, match=r"mine.*overwrite=True"):
        reproduce(tiny, tmp_path / "mine")
    reproduce(tiny, tmp_path / "mine", overwrite=True)


def test_every_row_of_the_digits_grid_runs_from_an_empty_folder(tmp_path):
    grid = replace(GRIDS["digits"], steps=3, images=3, validation=4)
    random = "score-purifier/white-box"  # is attacked by APGD only
    for attacks, rows in (("rand,fgsm", f"!{random}"), ("apgd", random)):
        text = reproduce(grid, tmp_path / attacks, rows=rows, attacks=attacks, verbose=False)
        assert "failed" not in text
        lines, columns = [line for line in text.splitlines() if line.startswith("| ")][2:], 4 + attacks.count(",")
        assert len(lines) == len(grid.only(rows).rows) and all(line.count("**") == 2 * columns for line in lines)


def test_purification_restores_accuracy_less_so_under_attacks_that_see_it(tmp_path):
    rows = (Row(), Row(defence="pixeldefend"), Row(defence="pixeldefend", threat="white-box"))
    grid = replace(GRIDS["digits"], rows=rows, attacks=("fgsm", "bim"), images=100, chunk=100)
    results = run(grid, tmp_path, verbose=False).results
    found = {(r["defence"], r["threat"], r["column"]): r["ours"] for r in entries(grid, results)}
    undefended, blind, white_box = (
        {column: found[row.defence, row.threat.name, column] for column in ("clean", "strongest")} for row in rows
    )
    assert undefended["clean"] > 95 and undefended["strongest"] < 20
    assert blind["clean"] == white_box["clean"] > undefended["clean"] - 5
    assert blind["strongest"] > undefended["strongest"] + 50
    assert white_box["strongest"] < blind["strongest"]
