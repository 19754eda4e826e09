import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date

from art_pixeldefend import datasets
from art_pixeldefend.evaluation import runner, store
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.paper.grids import per_radius
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store

ADAPTIVE = Row("vgg", "normal", "adaptive-pixeldefend")


def results(folder):
    """Every result by file name, without the parts that differ from run to run."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {}
    for name, path in files.items():
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            kept[name] = {key: value for key, value in content.items() if key not in ("seconds", "date", "hardware")}
        else:
            kept[name] = path.read_bytes()
    return kept


SCRIPT = """
import sys
import torch
from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.evaluation.paper.grids import defences
from art_pixeldefend.evaluation.runner import run
torch.set_num_threads(1)
run({source}, sys.argv[1], verbose=False)
"""


def script(folder, source):
    """A file that runs the tiny grid in another process, and the environment it needs."""
    file = folder / "script.py"
    file.write_text(SCRIPT.format(source=source))
    return str(file), os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}


def test_every_cell_has_settings_versions_counts_and_an_interval(finished, tiny, cells):
    found = cells(finished)
    assert len(found) == len(list(tiny.cells())) == 15
    for cell in found:
        assert cell["count"] == 32 == len(cell["right"]) and cell["right"].count("1") == cell["correct"]
        low, high = cell["interval_percent"]
        assert low <= cell["accuracy_percent"] <= high
        assert {"settings", "versions", "hardware", "seconds", "paper_percent"} <= set(cell)
        assert date.fromisoformat(cell["date"]) <= date.today()


def test_a_second_run_computes_nothing(finished, monkeypatch, tiny, run):
    def forbidden(*args, **kwargs):
        raise AssertionError("computed again")

    before = {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}
    monkeypatch.setattr("art_pixeldefend.evaluation.stages.Stages.right", forbidden)
    monkeypatch.setattr("art_pixeldefend.classifiers.train", forbidden)
    run(finished)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}


def test_a_run_interrupted_ten_times_ends_in_the_same_results(finished, tmp_path, monkeypatch, tiny, run):
    rng, write = random.Random(0), store.write_atomically
    for _ in range(10):
        left = rng.randint(1, 6)

        def interrupted(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            write(*args)

        monkeypatch.setattr(store, "write_atomically", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            run(tmp_path)
    monkeypatch.undo()
    run(tmp_path)
    assert results(tmp_path) == results(finished)


def test_a_killed_run_goes_on_to_the_same_results(finished, tmp_path, tiny, run, source):
    file, environment = script(tmp_path, source)
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, file, str(out)], env=environment)
    while process.poll() is None and len(list(out.rglob("*.npy"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it neither failed nor finished
    assert list(out.rglob("*.npy")) and not (out / "table.md").exists()
    run(out)
    assert {name: kept for name, kept in results(out).items() if not name.endswith(".partial")} == results(finished)


def test_a_cell_that_fails_is_recorded_and_stops_no_other(tmp_path, tiny, run, cells):
    broken = {**tiny.defences, "broken": (("art.defences.preprocessor.NoSuchThing", {}),)}
    grid = replace(tiny, defences=broken, rows=(Row("vgg", "normal", "broken"), Row("vgg")), images=8, eps=(16,))
    text = run(tmp_path, grid)
    failed = [cell for cell in cells(tmp_path) if "error" in cell]
    assert len(failed) == 3 and all("NoSuchThing" in cell["error"] for cell in failed)
    assert sum("accuracy_percent" in cell for cell in cells(tmp_path)) == 3
    assert "| failed | failed | failed |" in text and "NoSuchThing" in text


def test_training_that_fails_is_tried_once(tmp_path, monkeypatch, tiny, run):
    calls = []

    def diverge(*args, **kwargs):
        calls.append(args)
        raise FloatingPointError("diverged")

    monkeypatch.setattr("art_pixeldefend.classifiers.train", diverge)
    assert "diverged" in run(tmp_path, replace(tiny, images=8))
    assert len(calls) == 1


def test_a_threshold_that_cannot_be_chosen_is_tried_once_and_stops_no_other_row(
    tmp_path, monkeypatch, tiny, run, cells
):
    calls = []

    def fail(*args):
        calls.append(args)
        raise FloatingPointError("no threshold in sight")

    monkeypatch.setattr("art_pixeldefend.purifiers.AdaptivePixelDefend.calibrate", fail)
    grid = replace(
        tiny, rows=(ADAPTIVE, replace(ADAPTIVE, threat="white-box"), Row("vgg")), images=4, steps=2, eps=(16,)
    )
    text = run(tmp_path, grid)
    assert len(calls) == 1
    assert "in sight" in text and text.count("| failed | failed | failed |") == 2
    assert sum("accuracy_percent" in cell for cell in cells(tmp_path)) == 3


def larger(tiny):
    """The tiny grid with two rows whose threshold is calibrated, and other attacks."""
    rows = (*tiny.rows, replace(ADAPTIVE, eps=(40,), images=8), replace(ADAPTIVE, eps=(40,), threat="white-box"))
    return replace(tiny, rows=rows, attacks=("rand", "bim"))


def test_a_plan_counts_what_is_missing_and_computes_nothing(finished, tiny, tmp_path):
    data = datasets.load("digits")
    assert runner.plan(Stages(larger(tiny), data, Store(tmp_path))).splitlines() == [
        "images:      the first 32 test images; fewer, from 8 on, in 1 of the rows",
        "rows:        5: 1 without a defence, 2 white-box, 2 blind",
        "attacks:     rand, bim within 16 and 40 levels",
        "classifiers: 1 to train, 0 stored",
        "thresholds:  1 to choose",  # one for both rows
        "cells:       21 to compute, 0 stored",
    ]
    assert not list(tmp_path.iterdir())
    text = runner.plan(Stages(larger(tiny).only(attacks=("rand",)), data, Store(finished)))
    assert "attacks:     rand within" in text and "classifiers: 0 to train, 1 stored" in text
    assert "cells:       4 to compute, 9 stored" in text  # those of the calibrated rows are missing


def test_a_plan_of_every_cell_names_what_is_missing(finished, tiny, tmp_path):
    text = runner.plan(Stages(larger(tiny), datasets.load("digits"), Store(tmp_path)), every_cell=True)
    assert text.count("to train: ") == 1 and text.count("to calibrate: ") == 1  # one for both rows
    assert "to do:  vgg/normal/none bim 40, 32 images, gradients per image: 44" in text
    assert text.count("to do: ") == 3 * 5 + 2 * 3 and not list(tmp_path.iterdir())
    stages = Stages(tiny, datasets.load("digits"), Store(finished))
    assert runner.plan(stages, every_cell=True).count("done: ") == 15


def test_rows_of_two_deltas_have_classifiers_and_tables_of_their_own(tmp_path, tiny, run, cells):
    rows = per_radius([Row("vgg", "adversarial-fgsm", "feature-squeezing"), Row("vgg")], (16, 40))
    grid = replace(tiny, rows=rows, images=8, attacks=("rand",), steps=2)
    text = run(tmp_path, grid)
    first, second = text.split("## Attacks within 40")
    title = "| vgg, adversarial-fgsm (delta {}), feature-squeezing |"
    assert title.format(16) in first and title.format(16) not in second
    assert title.format(40) in second and title.format(40) not in first
    assert "| vgg, normal, none |" in first and "| vgg, normal, none |" in second
    assert len(list((tmp_path / "classifiers").iterdir())) == 3
    assert {cell["settings"]["classifier"].get("delta") for cell in cells(tmp_path)} == {16, 40, None}
