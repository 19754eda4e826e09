"""The page of detection says what its results say, and stored arrays are those of the settings asked for."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("detection")


@pytest.fixture
def result():
    return json.loads((BENCHMARKS / "results" / "detection.json").read_text())


def test_the_page_is_rendered_from_the_results_alone(script, tmp_path):
    shutil.copy(BENCHMARKS / "results" / "detection.json", tmp_path)
    script.write_page(tmp_path)
    assert (tmp_path / "detection.md").read_text() == (BENCHMARKS / "results" / "detection.md").read_text()


def test_the_sentence_on_single_scores_follows_from_the_areas(script, result):
    names = ["a", "b", script.COMBINED]

    def areas(*values):
        return {"scores": {name: {"auroc": value} for name, value in zip(names, values, strict=True)}}

    kinds = {"near": areas(0.905, 0.5, 0.9), "worse": areas(0.8, 0.7, 0.9), "better": areas(0.7, 0.95, 0.9)}
    assert script.better_alone({"kinds": kinds}).endswith(" for: better (b: 0.950, combined: 0.900).")
    del kinds["better"]
    assert script.better_alone({"kinds": kinds}).endswith(" for: none.")
    kinds["near"]["fooling"] = areas(1, 0, 0.5)["scores"]
    assert "near, misclassified (a: 1.000, combined: 0.500)" in script.better_alone({"kinds": kinds})


def test_the_images_that_chose_the_combination_are_not_those_of_the_page(script, result):
    assert script.CHOICE.start >= result["clean_images"] and script.CHOICE.stop <= 10_000 - result["calibration_images"]


def test_stored_arrays_are_reused_for_the_same_settings_only(script, tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"x": np.array(len(calls))}

    def arrays(settings):
        return script.Cache(tmp_path).arrays("aware", settings, compute)

    first = arrays({"eps": 8, "steps": 25})
    assert first["x"] == 1 and "seconds" not in first
    assert arrays({"steps": 25, "eps": 8})["x"] == 1 and len(calls) == 1
    assert arrays({"eps": 8, "steps": 50})["x"] == 2 and len(calls) == 2
    assert len(list(tmp_path.rglob("*"))) == 3  # a folder of two files
