"""What the scripts of benchmarks/ share, and what they refuse."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.evaluation.paper import drawing
from art_pixeldefend.evaluation.paper.grids import GRIDS, defences

ADAPTIVE = Row("vgg", "normal", "adaptive-pixeldefend")
TINY = Grid(
    "digits", (Row("vgg"), ADAPTIVE), eps=(40,), attacks=("fgsm",), defences=defences(56, 3),
    models={"pixel_cnn": "digits"},
    recipe="digits", steps=2, sizes={"vgg": {"width": 2}}, images=4, validation=4, chunk=4,
)  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """Imports a script as those beside it do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def published(script):
    return script("published")


def publish(published, folder, grid=TINY, **options):
    """The table's files, by their endings."""
    published.publish(grid, folder / "work", folder, "table", lambda facts: f"{facts['date']}\n", None, **options)
    return {path.name.removeprefix("table"): path for path in folder.iterdir() if path.is_file()}


def facts(files):
    return json.loads(files[".json"].read_text())["facts"]


def fails(*args, **kwargs):
    raise FloatingPointError("not today")


def test_a_table_is_published_where_a_threshold_cannot_be_chosen(published, tmp_path, monkeypatch):
    monkeypatch.setattr("art_pixeldefend.purifiers.AdaptivePixelDefend.calibrate", fails)
    files = publish(published, tmp_path, figures=())
    assert set(files) == {".md", ".csv", ".json"}
    assert "not today" in files[".md"].read_text() and facts(files)["thresholds_bits_per_dim"] == {}
    assert len(facts(files)["classifiers"]) == 1
    errors = [cell["error"] for cell in json.loads(files[".json"].read_text())["cells"] if "error" in cell]
    assert len(errors) == 2 and not any("Traceback" in error for error in errors)


def test_a_classifier_that_cannot_be_trained_is_tried_once_for_run_and_table(published, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("art_pixeldefend.classifiers.train", lambda *args, **kwargs: calls.append(args) or fails())
    assert facts(publish(published, tmp_path, figures=()))["classifiers"] == {}
    assert len(calls) == 1


def test_rows_that_are_added_later_leave_the_earlier_cells_as_they_were(published, tmp_path, monkeypatch):
    first = json.loads(publish(published, tmp_path, replace(TINY, rows=TINY.rows[:1]), figures=())[".json"].read_text())
    monkeypatch.setattr("art_pixeldefend.evaluation.runner.hardware", lambda: "another machine")
    both = json.loads(publish(published, tmp_path, figures=())[".json"].read_text())
    count = len(first["cells"])
    assert both["cells"][:count] == first["cells"] and len(both["cells"]) == 2 * count
    assert {cell["hardware"] for cell in both["cells"][count:]} == {"another machine"}
    assert both["facts"]["classifiers"] == first["facts"]["classifiers"]  # both rows attack the same one


def test_a_partial_table_says_what_it_leaves_out(script):
    page, grid = script("paper_table"), GRIDS["cifar-10"]
    facts = {
        "date": "today", "hardware": "here", "density_model": "m", "density_model_provenance": {},
        "density_model_configuration": {"filters": 4, "resnets": 1}, "first_labels": page.FIRST_LABELS["cifar-10"],
    }  # fmt: skip
    assert "Left out" not in page.head(facts, grid) and " rows." not in page.head(facts, grid)
    assert "Left out: resnet/adversarial-bim/none." in page.head(facts, grid.only("!adversarial-bim"))
    assert f" 1 of {len(grid.rows)} rows." in page.head(facts, grid.only("vgg/normal/none"))
    assert "another order" not in page.head(facts, grid)
    assert "another order" in page.head(facts | {"first_labels": [1, 5]}, grid)


def test_a_density_model_that_is_not_there_is_refused_before_the_work_is_done(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="--pixel-cnn"):
        publish(published, tmp_path, replace(TINY, models={"pixel_cnn": "no/such.safetensors"}))
    assert not list(tmp_path.iterdir())


def test_only_figures_that_the_run_drew_are_published(published, tmp_path, monkeypatch):
    def draw(stages, folder):
        for name in ("samples.png", "samples.pdf", "detection.json"):
            (folder / name).write_text('{"eps": "new"}')
        return [folder / name for name in ("samples.png", "samples.pdf", "detection.json")]

    monkeypatch.setattr(drawing, "score", lambda *_: None)
    monkeypatch.setattr(drawing, "draw", draw)
    figures = tmp_path / "work" / "figures"
    figures.mkdir(parents=True)
    for name in ("samples.png", "roc-40.png"):
        (figures / name).write_text("old")
    grid = replace(TINY, rows=(Row("vgg", "normal", "pixeldefend"),))
    files = publish(published, tmp_path, grid)
    assert set(files) == {".md", ".csv", ".json", "-samples.png", "-detection.json"}
    assert json.loads(files["-samples.png"].read_text()) == {"eps": "new"}
    detection = json.loads(files["-detection.json"].read_text())
    assert set(detection) == {"command", "date", "hardware", "versions", "eps"} and detection["eps"] == "new"


def test_date_hardware_and_versions_are_those_of_the_cells(published, tmp_path):
    publish(published, tmp_path, replace(TINY, rows=TINY.rows[:1]), figures=())
    made = sorted((tmp_path / "work" / "cells").iterdir())
    for path, day in zip(made, ("2001-02-03", "2001-03-04"), strict=True):
        cell = json.loads(path.read_text()) | {"date": day, "hardware": f"an abacus of {day}"}
        path.write_text(json.dumps(cell | {"versions": cell["versions"] | {"torch": "0.1"}}))
    files = publish(published, tmp_path, replace(TINY, rows=TINY.rows[:1]), figures=())
    assert files[".md"].read_text().startswith("2001-02-03 to 2001-03-04\n")
    assert facts(files)["hardware"].count("abacus") == 2 and facts(files)["versions"]["torch"] == "0.1"


@pytest.mark.parametrize(
    ("dates", "shown"),
    [
        (["2001-02-03", "2001-02-03"], "2001-02-03"), (["2001-02-04", "2001-02-03"], "2001-02-03 to 2001-02-04"),
        ([None, "2001-02-03"], "until 2001-02-03"),
    ],
)  # fmt: skip
def test_cells_from_before_there_were_dates_are_as_old_as_can_be_said(published, dates, shown):
    cells = [{"hardware": "h", "versions": {}} | ({"date": date} if date else {}) for date in dates]
    assert published.origin(cells)["date"] == shown
    assert published.origin([{"hardware": "h", "versions": {}}])["date"].startswith("until ")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--work /a --results=/b --data-dir /c", "--work FOLDER --results FOLDER --data-dir FOLDER"),
        ("--out=/a --output /b --classifier c", "--out FILE --output FILE --classifier FILE"),
        ("--density-model a/b --density-model=c", "--density-model FILE --density-model FILE"),
        ("--pixel-cnn fashion-mnist --model=digits", "--pixel-cnn fashion-mnist --model digits"),
        ("--pixel-cnn /a.safetensors --model=/b --data /c", "--pixel-cnn FILE --model FILE --data FILE"),
        ("--shorter=a/b=9 --rows !vgg --bf16 --batch 1 2", "--shorter a/b=9 --rows '!vgg' --bf16 --batch 1 2"),
    ],
)
def test_commands_are_shown_without_places(published, monkeypatch, given, shown):
    monkeypatch.setattr(sys, "argv", ["/home/me/x.py", *given.split()])
    monkeypatch.delenv("RANK", raising=False)
    assert published.command("x.py") == f"python benchmarks/x.py {shown}"


def test_a_tables_options_change_its_grid(published):
    grid = published.table_grid(
        "fashion-mnist", chunk=9, fewer=["/pixeldefend/white-box=7"], shorter=["vgg/normal/none=3"]
    )
    before = GRIDS["fashion-mnist"]
    assert (grid.chunk, grid.models) == (9, before.models)
    fewer = {row.name for row, old in zip(grid.rows, before.rows, strict=True) if row.images != old.images}
    assert fewer == {row.name for row in before.rows if row.name.endswith("/pixeldefend/white-box")} != set()
    assert {row.name for row in grid.rows if row.steps == 3} == {
        row.name for row in grid.rows if row.name.startswith("vgg/normal/")
    }  # every row of the classifier: a table has one vgg/normal


@pytest.mark.parametrize("option", ["fewer", "shorter"])
@pytest.mark.parametrize(
    "choice", ["pixeldefnd/white-box=100", "100", "=100", "normal/none=", "normal/none=0", "normal/none=x"]
)
def test_a_change_of_no_row_or_to_nothing_is_refused(published, option, choice):
    with pytest.raises(typer.BadParameter, match=f"--{option} must"):
        published.table_grid("fashion-mnist", **{option: [choice]})


def test_an_unknown_data_set_is_refused_with_the_known_ones(published):
    with pytest.raises(typer.BadParameter, match="fashion-mnist"):
        published.table_grid("fashon")


@pytest.mark.parametrize("name", ["fgms", "art.attacks.evasion.FastGradient", "no.such.Attack", ".Attack"])
def test_an_unknown_attack_is_refused_with_the_known_ones(script, name):
    with pytest.raises(typer.BadParameter, match="fgsm"):
        script("vs_feature_squeezing").attack_of(name, None, 8, {})


@pytest.mark.parametrize(("images", "rounds", "had"), [(9, 9, 9), (20, 9, 9), (3, 9, 3), (20, 4, 4)])
def test_scoring_has_the_rounds_it_says_and_all_images(script, make_model, monkeypatch, images, rounds, had):
    scoring, seen = script("scoring_speed"), []
    monkeypatch.setattr(scoring, "fastest_forward", lambda *_: {"chunk": 4, "channels_last": False})
    monkeypatch.setattr(scoring, "seconds", lambda timed, _: seen.append(len(timed.args[-1])) or 1.0)
    model = make_model((1, 5, 7))
    found = scoring.measure(model, scoring.some_images(model, images), rounds)
    assert found["rounds"] == had and len(seen) == 2 * had and sum(seen) == 2 * images
    assert max(seen) - min(seen) <= 1
