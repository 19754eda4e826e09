import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from art_pixeldefend import PixelDefendDetector, datasets
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Row
from art_pixeldefend.evaluation.paper import drawing, likelihoods
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.processes import ProcessGroup


def test_a_finished_grid_is_drawn(tmp_path, tiny):
    row = Row("vgg", "normal", "pixeldefend")
    grid = replace(tiny, rows=(row,), eps=(40,), attacks=("fgsm",), images=4, chunk=4)
    stages = Stages(grid, datasets.load("digits"), Store(tmp_path))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "roc-8.png").write_bytes(b"another run's")
    files = {path.name for path in drawing.draw(stages, tmp_path / "figures", shown=3, samples=3) if path.is_file()}
    kinds = ("strips", "likelihoods", "p-values", "roc")
    drawn = [f"{kind}-40" for kind in kinds] + ["samples"]
    assert files == {f"{name}.{ending}" for name in drawn for ending in ("png", "pdf")} | {"detection.json"}
    numbers = json.loads((tmp_path / "figures" / "detection.json").read_text())["eps"]["40"]
    detector, bare = PixelDefendDetector("digits"), Cell(replace(row, defence="none"), "fgsm", 40)
    clean, attacked = (detector.score(x) for x in (stages.clean(0, 4), stages.attacked(bare, 0, 4)))
    assert numbers["auroc"] == {"FGSM": (attacked[:, None] < clean).mean()}
    bits = {name: pair[0] for name, pair in numbers["bits_per_dim"].items()}
    expected = {CLEAN: stages.clean(0, 4), "FGSM": stages.attacked(bare, 0, 4)}
    assert bits == {name: pytest.approx(detector.bits_per_dim(x).mean()) for name, x in expected.items()}
    assert "appendix_a" not in numbers  # no noise, no counts


def test_figures_compare_with_calibration_images_or_as_the_paper_with_training_images(tmp_path, monkeypatch, tiny):
    grid = replace(tiny, rows=(Row("vgg", "normal", "pixeldefend"),), eps=(40,), attacks=("rand",), images=30, chunk=30)
    data, drawn = datasets.load("digits"), []
    monkeypatch.setattr(Stages, "defended", Stages.attacked)  # nothing to purify
    monkeypatch.setattr(drawing, "_strips", lambda *_: None)
    monkeypatch.setattr(drawing.figures, "roc_curves", lambda *args: drawn.append(args) or {"clean (control)": 0.5})
    for reference in ("calibration", "training"):
        stages = Stages(replace(grid, reference=reference), data, Store(tmp_path))
        drawing.draw(stages, tmp_path / reference, samples=2)
        numbers = json.loads((tmp_path / reference / "detection.json").read_text())
        assert numbers["reference"] == {"images": reference, "count": {"calibration": 200, "training": 1000}[reference]}
        assert numbers["eps"]["40"]["auroc_control"] == 0.5
    score = PixelDefendDetector("digits", (0, 255)).score
    clean, calibration = score(data.x_test[:30]), score(data.reserve().x)
    training = score(data.train_and_calibration().x[:1000])
    for (_, negatives, positives, _), expected in zip(drawn, ((clean, calibration), (training, clean)), strict=True):
        np.testing.assert_allclose(negatives, expected[0], rtol=1e-5)
        np.testing.assert_allclose(positives["clean (control)"], expected[1], rtol=1e-5)


def test_likelihoods_for_the_figures_are_shared_out_and_computed_once(tmp_path, monkeypatch, tiny):
    row = Row("vgg", "normal", "pixeldefend")
    grid = replace(tiny, rows=(row,), eps=(40,), attacks=("rand",), images=6, chunk=4)
    stages = Stages(grid, datasets.load("digits"), Store(tmp_path))
    done, score = Counter(), PixelDefendDetector.score
    monkeypatch.setattr(ProcessGroup, "wait", lambda self: None)  # no other process to wait for
    for rank in (0, 1):
        monkeypatch.setattr(PixelDefendDetector, "score", lambda *args, rank=rank: done.update([rank]) or score(*args))
        drawing.score(stages, ProcessGroup(rank, 2))
    # Two chunks of clean and of noisy images, each as they are and purified, and the training images.
    assert done == {0: 5, 1: 4}
    detector = PixelDefendDetector(likelihoods.density_model(stages))
    cell, images = Cell(row, "rand", 40), range(0, 6, 4)
    expected = [detector.score(stages.defended(cell, start, min(4, 6 - start))) for start in images]
    monkeypatch.setattr(PixelDefendDetector, "score", lambda *_: pytest.fail("scored again"))
    for start, scores in zip(images, expected, strict=True):
        np.testing.assert_array_equal(likelihoods.scores(stages, cell, start, len(scores)), scores)
    drawing.draw(stages, tmp_path / "figures", samples=3)


def test_a_grid_without_a_blind_pixeldefend_row_is_not_drawn(tmp_path, tiny):
    stages = Stages(tiny, datasets.load("digits"), Store(tmp_path))
    assert drawing.draw(stages, tmp_path) == []
