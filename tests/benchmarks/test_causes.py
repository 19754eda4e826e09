"""Changes of one thing at a time, measured in the folder of a table."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from art_pixeldefend import PixelCNNpp, classifiers, datasets
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.paper.grids import GRIDS
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sizes = {"resnet": {"units": 1, "width": 2}, "vgg": {"width": 2}}
    monkeypatch.setitem(GRIDS, "digits", replace(GRIDS["digits"], steps=2, sizes=sizes, chunk=4))
    return importlib.import_module("causes")


def test_the_same_cells_are_measured_with_another_density_model(script, tmp_path):
    PixelCNNpp((1, 8, 8), filters=3, resnets=1).save(tmp_path / "worse" / "model.safetensors")
    out = tmp_path / "causes.json"
    script.main(
        tmp_path / "work", "digits", [tmp_path / "worse" / "model.safetensors"], ["density_models", "eps_defend"],
        images=4, out=out,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert {"thresholds", "classifiers", "attacks"}.isdisjoint(result)
    ours, worse = (result["density_models"][name] for name in ("digits", "worse"))
    assert set(ours) == set(worse) == {"bits_per_dim", "clean", "fgsm 40", "bim 40"}
    assert worse["bits_per_dim"] > ours["bits_per_dim"] + 1
    assert list(result["eps_defend"]) == ["56", "28", "42", "70", "84", "112"]
    assert result["eps_defend"]["56"].items() <= ours.items()


def test_a_network_is_trained_for_another_number_of_steps(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "OTHER_STEPS", (30,))
    script.main(tmp_path / "work", "digits", [], ["recipes"], images=4, out=tmp_path / "causes.json")
    result = json.loads((tmp_path / "causes.json").read_text())["recipes"]
    assert list(result) == ["as in the table", "30 steps"]
    for numbers in result.values():
        assert set(numbers) == {"all test images", "fgsm 40", "bim 40"}
        assert set(numbers["bim 40"]) == {"alone", "purified"}
    assert result["30 steps"]["all test images"] > result["as in the table"]["all test images"] + 10


def test_next_to_no_noise_leaves_the_classifiers_accuracy(script, tmp_path, monkeypatch):
    grid = replace(GRIDS["digits"], steps=60, validation=20)
    monkeypatch.setitem(GRIDS, "digits", grid)
    monkeypatch.setattr(script, "SIGMAS", (1e-6, 0.5))
    script.main(tmp_path / "work", "digits", [], ["sigma"], images=4, out=tmp_path / "causes.json")
    result = json.loads((tmp_path / "causes.json").read_text())["sigma"]
    data = datasets.load("digits")
    stages = Stages(grid, data, Store(tmp_path / "work"))
    x, y = (of[-200:-180] for of in (data.x_test, data.y_test))  # reserved
    accuracy = 100 * classifiers.accuracy(stages.classifier(Row("resnet")), x.astype(np.float32) / 255, y)
    assert result["images"] == 20 and accuracy > 50
    assert result["accuracy_percent"]["1e-06"]["clean"] == pytest.approx(accuracy)
    assert result["accuracy_percent"]["0.5"]["clean"] < accuracy


def test_an_unknown_part_is_refused(script, tmp_path):
    with pytest.raises(typer.BadParameter, match="thresholds"):
        script.main(tmp_path, part=["threshold"])
