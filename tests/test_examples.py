"""The scripts and notebooks in examples/ run."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from art.estimators.classification import PyTorchClassifier
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from art_pixeldefend.classifiers.training import seeded

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_pictures_of_readme_and_site_can_be_drawn(tmp_path):
    script("purified_images").purification(tmp_path, shown=2)
    script("purified_images").detection(tmp_path, images=4, attacks=("rand", "fgsm"))
    for name in ("purified.png", "purifiers.png", "detection.png"):
        assert Image.open(tmp_path / name).format == Image.open(EXAMPLES.parent / "docs" / "images" / name).format


def script(name):
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def test_a_network_in_plain_pytorch_is_defended_and_attacked():
    with seeded(0):
        results = script("plain_pytorch").main(epochs=10, images=40, steps=5)
    assert results["undefended, clean"] > 0.9 and results["undefended, attacked"] < 0.3
    assert results["purified, blind attack"] > results["undefended, attacked"] + 0.3


def test_an_estimator_of_numpy_arrays_is_defended():
    results = script("scikit_learn").main(images=60)
    assert results["purified, clean"] > 0.9
    assert results["purified, attacked"] > results["undefended, attacked"] + 0.2


def test_a_model_is_trained_on_a_folder_and_purifies_and_detects(tmp_path):
    example = script("own_images")
    (tmp_path / "images").mkdir(), (tmp_path / "out").mkdir()
    example.write_digits(tmp_path / "images", 250)
    p_values = example.main(tmp_path / "images", tmp_path / "out", steps=2, filters=4)
    assert len(p_values) == 25 and ((p_values > 0) & (p_values <= 1)).all()
    assert len(list((tmp_path / "out").glob("purified-*.png"))) == 10


def test_a_leaderboard_entry_is_made():
    pytest.importorskip("pyautoattack")
    with seeded(0):
        entry = script("robustbench_style").main(images=4, steps=2, draws=1, runs=1)
    assert json.loads(json.dumps(entry))["images"] == 4 and entry["autoattack_acc"] <= entry["clean_acc"] <= 100


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_with_few_images(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code, changed = re.subn(r"^IMAGES = \d+$", "IMAGES = 6", "\n".join("".join(c["source"]) for c in cells), flags=re.M)
    assert changed == 1
    with seeded(0):
        exec(code, {})


def test_notebooks_are_small_and_hold_no_outputs():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert path.stat().st_size < 20_000
        assert not any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])


@pytest.fixture
def black_box():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "black_box.py")))


def test_a_defended_classifier_is_attacked_through_a_substitute(fashion_mnist, black_box, capsys):
    results = black_box.main(training_steps=20, epochs=1, rounds=1, queries=8, images=6)
    assert list(results) == ["no defence", "ManifoldProjection"]
    for row in results.values():
        assert row["queries"] == 16 and all(0 <= row[name] <= 100 for name in ("clean", "FGSM 8", "PGD 25"))
    assert "ManifoldProjection: queries 16.0" in capsys.readouterr().out


def test_a_substitute_learns_the_labels_that_it_asks_for_and_asks_for_each_image_once(black_box):
    asked = []

    def brightness(x):
        asked.append(x)
        return (x.mean((1, 2, 3)) > 0.5).astype(int)

    rng = np.random.default_rng(0)
    x = (rng.uniform(0, 0.5, (20, 1, 28, 28)) + 0.5 * rng.integers(0, 2, (20, 1, 1, 1))).astype(np.float32)
    substitute, count = black_box.train_substitute(brightness, x, rounds=2, epochs=10)
    assert count == 80 and [len(some) for some in asked] == [20, 20, 40]
    assert (substitute.predict(x).argmax(1) == brightness(x)).mean() >= 0.9


def test_augmentation_moves_images_along_the_gradient_of_their_label(black_box):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    substitute = PyTorchClassifier(network, nn.CrossEntropyLoss(), (1, 2, 2), 3)
    x, labels = np.full((3, 1, 2, 2), 0.5, np.float32), np.array([2, 0, 1])
    x[0, 0, 0, 0] = 1.0
    signs = np.sign(network[1].weight.detach().numpy()[labels]).reshape(x.shape)
    np.testing.assert_allclose(black_box.augmented(substitute, x, labels), np.clip(x + 0.1 * signs, 0, 1), rtol=1e-6)
