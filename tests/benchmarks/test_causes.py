"""Changes of one thing at a time, measured in the folder of a table."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from art_pixeldefend import PixelCNNpp
from art_pixeldefend.evaluation.paper.grids import GRIDS


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sizes = {"resnet": {"units": 1, "width": 2}}
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


def test_an_unknown_part_is_refused(script, tmp_path):
    with pytest.raises(typer.BadParameter, match="thresholds"):
        script.main(tmp_path, part=["threshold"])
