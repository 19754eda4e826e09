import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from art_pixeldefend import datasets
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.paper.grids import GRIDS
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ADAPTIVE = Row("vgg", "normal", "adaptive-pixeldefend")


def test_blind_rows_share_attacked_images(finished):
    # Noise: one for each radius; FGSM: one for each radius blind, one white-box; each of four chunks.
    assert len(list((finished / "attacked").iterdir())) == 4 * (2 + 2 * 2)


def test_images_of_attacks_with_a_radius_are_kept_as_bytes(finished):
    for path in (finished / "attacked").iterdir():
        assert np.load(path, allow_pickle=False).dtype == np.uint8


def test_adaptive_thresholds_are_calibrated_once(tmp_path, tiny, run, cells, monkeypatch):
    grid = replace(tiny, rows=(ADAPTIVE,), eps=(40,), images=4, validation=6, chunk=4)
    thresholds = [3.5, 4.5]
    monkeypatch.setattr("art_pixeldefend.purifiers.AdaptivePixelDefend.calibrate", lambda *_: thresholds.pop(0))
    assert "Thresholds are chosen on 6 of the last test images" in run(tmp_path, grid)
    assert run(tmp_path, replace(grid, images=8)) and thresholds == [4.5]
    (path,) = (tmp_path / "thresholds").iterdir()
    assert json.loads(path.read_text())["threshold"] == 3.5
    assert {cell["settings"]["defence"]["steps"][0][1]["threshold"] for cell in cells(tmp_path)} == {3.5}


def test_thresholds_are_chosen_on_test_images_that_no_model_has_seen_and_no_table_reports(tmp_path, monkeypatch, tiny):
    grid = replace(tiny, rows=(ADAPTIVE,), eps=(40,), attacks=("rand",), images=4, validation=6)
    data = datasets.load("digits")
    stages, seen = Stages(grid, data, Store(tmp_path)), []
    monkeypatch.setattr(stages, "classifier", lambda *_: None)
    monkeypatch.setattr(stages, "attacked", lambda _, *which: stages.clean(*which))
    monkeypatch.setattr(
        "art_pixeldefend.purifiers.AdaptivePixelDefend.calibrate", lambda self, c, x, y: seen.append((x, y)) or 0.0
    )
    stages.threshold(ADAPTIVE, grid.defences["adaptive-pixeldefend"][0])
    ((attacked, y),) = seen
    reserve = data.reserve()
    assert np.allclose(attacked["within 40 levels"]["rand"] * 255, reserve.x[:6]) and np.array_equal(y, reserve.y[:6])
    x_train = stages.splits["train"][0]
    assert np.array_equal(x_train, data.train_and_calibration().x[:-6])  # as the published classifiers


@pytest.mark.parametrize(("change", "message"), [({"images": 201}, "images"), ({"validation": 201}, "validation")])
def test_a_table_that_reports_the_images_of_its_threshold_is_refused(change, message, tmp_path, tiny):
    data, calibrated = datasets.load("digits"), replace(tiny, rows=(ADAPTIVE,), **change)
    with pytest.raises(ValueError, match=f"{message}.* at most 200"):
        Stages(calibrated, data, Store(tmp_path))
    Stages(replace(tiny, **change), data, Store(tmp_path))  # no threshold, no such limit


def test_a_row_without_a_delta_has_the_classifier_of_the_grids(tmp_path, tiny):
    stages = Stages(tiny, datasets.load("digits"), Store(tmp_path))
    row = Row("vgg", "adversarial-fgsm")
    assert stages.training(row) == stages.training(replace(row, delta=tiny.delta))
    assert "delta" not in stages.training(Row("vgg"))


def test_a_row_may_shorten_its_classifiers_training(tmp_path, tiny):
    stages, row = Stages(tiny, datasets.load("digits"), Store(tmp_path)), Row("vgg")
    shorter = replace(row, steps=7)
    assert [stages.training(r)["recipe"]["steps"] for r in (row, shorter, shorter.classifier)] == [tiny.steps, 7, 7]


def test_attacked_classifiers_have_no_gradients_in_their_weights(finished, tiny):
    stages = Stages(tiny, datasets.load("digits"), Store(finished))
    classifier = stages.classifier(tiny.rows[0], False)
    assert not any(parameter.requires_grad for parameter in classifier.model.parameters())


def test_the_published_classifiers_are_trained_on_the_same_images_as_before(fashion_mnist, tmp_path):
    published = json.loads((RESULTS / "fashion-mnist.json").read_text())["facts"]["classifiers"]
    stages = Stages(GRIDS["fashion-mnist"], fashion_mnist, Store(tmp_path))
    ours = stages.training(GRIDS["fashion-mnist"].rows[0])
    for classifier in published.values():
        assert all(classifier["training"][name] == ours[name] for name in ("dataset", "validation", "seed"))
