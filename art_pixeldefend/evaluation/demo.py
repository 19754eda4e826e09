"""The demo: attack a small classifier of digits, purify the attacked images, and detect them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import FeatureSqueezing
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import __version__, datasets
from art_pixeldefend.attacks import ATTACKS, PAPER, make_attack
from art_pixeldefend.detectors import PixelDefendDetector
from art_pixeldefend.evaluation import figures
from art_pixeldefend.evaluation.stages import seeded
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import from_levels, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.purifiers import AdaptivePixelDefend, PixelDefend, ScorePurifier

EPS_ATTACK, EPS_DEFEND = 40, 56  # levels of 255; the grey values of the digits are 16 levels apart
SIGMA = 0.25  # of the noise that the score purifier adds and removes, in the range from 0 to 1
VALIDATION = 100  # calibration images that choose the adaptive threshold; the table does not report them
NAMES = {"clean": "clean"} | {name: ATTACKS[name].title for name in PAPER}


def run(out: Path, *, seed: int = 0, verbose: bool = True) -> str:
    """Run the demo and write ``report.md``, ``results.json`` and the pictures into the folder ``out``.

    Returns:
        The table of the report, as Markdown.
    """
    began = time.perf_counter()
    data, pixel_cnn = datasets.load("digits"), PixelCNNpp.from_pretrained("digits")
    train, calibration, test = data.train_and_calibration(), data.calibration(pixel_cnn), data.test(pixel_cnn)
    classifier = train_classifier(as_images(train.x), train.y, seed)
    _say(verbose, f"classifier trained ({time.perf_counter() - began:.0f} s)")

    validation = attack(classifier, as_images(calibration.x[:VALIDATION]), calibration.y[:VALIDATION], seed)
    images, y = attack(classifier, as_images(test.x), test.y, seed), test.y
    _say(verbose, f"attacked ({time.perf_counter() - began:.0f} s)")

    defences = make_defences(pixel_cnn, seed)
    adaptive = defences["Adaptive PixelDefend"]
    threshold = adaptive.calibrate(classifier, attacks_of(validation), calibration.y[:VALIDATION])
    defended = {name: {attack: defence(x)[0] for attack, x in images.items()} for name, defence in defences.items()}
    defended = {"none": images} | defended
    predicted = {name: {a: predict(classifier, x) for a, x in versions.items()} for name, versions in defended.items()}
    accuracies = {name: {a: float((p == y).mean()) for a, p in row.items()} for name, row in predicted.items()}
    _say(verbose, f"purified ({time.perf_counter() - began:.0f} s)")

    detector = PixelDefendDetector(pixel_cnn)
    detector.fit(as_images(calibration.x))
    p_values = {a: detector.detect(x)[0]["p_values"] for a, x in images.items()}
    p_purified = {a: detector.detect(x)[0]["p_values"] for a, x in defended["PixelDefend"].items()}
    auroc = {a: figures.auroc(p_values["clean"], p) for a, p in attacks_of(p_values).items()}

    draw(out, images, defended["PixelDefend"], predicted, p_values, p_purified)
    results = {
        "version": __version__, "seed": seed, "images": len(y), "calibration_images": len(calibration.y),
        "seconds": round(time.perf_counter() - began, 1),
        "eps_attack": EPS_ATTACK, "eps_defend": EPS_DEFEND, "sigma": SIGMA,
        "adaptive_threshold_bits_per_dim": threshold,
        "density_model": pixel_cnn.provenance, "accuracy": accuracies, "detection_auroc": auroc,
    }  # fmt: skip
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "report.md", report(results))
    return table(results)


def as_images(levels: np.ndarray) -> np.ndarray:
    """Return levels as images in [0, 1], float32."""
    return from_levels(levels)


def train_classifier(x: np.ndarray, y: np.ndarray, seed: int) -> PyTorchClassifier:
    """Train a small convolutional network for a few seconds."""
    with seeded(seed):  # torch initialises the weights, ART shuffles with NumPy
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, clip_values=(0.0, 1.0))
        classifier.fit(x, np.eye(10, dtype=np.float32)[y], batch_size=64, nb_epochs=20)
    return classifier


def attack(classifier: PyTorchClassifier, x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return images clean and under each of the paper's attacks, by name. The attacks see no defence."""
    one_hot = np.eye(10, dtype=np.float32)[y]
    attacks = {name: make_attack(name, classifier, EPS_ATTACK, seed=seed) for name in PAPER}
    return {"clean": x} | {
        name: attack.generate(x, one_hot if ATTACKS[name].true_labels else None) for name, attack in attacks.items()
    }


def make_defences(pixel_cnn: PixelCNNpp, seed: int) -> dict[str, Any]:
    """Return the defences by their names in the table; ``seed`` is that of the stochastic one."""
    return {
        "feature squeezing": FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=3),
        "PixelDefend": PixelDefend(eps=EPS_DEFEND, pixel_cnn=pixel_cnn),
        "Adaptive PixelDefend": AdaptivePixelDefend(eps=EPS_DEFEND, pixel_cnn=pixel_cnn),
        "score purifier": ScorePurifier("digits-score", SIGMA, seed=seed),
    }


def attacks_of(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return all columns except "clean"."""
    return {name: value for name, value in columns.items() if name != "clean"}


def predict(classifier: PyTorchClassifier, x: np.ndarray) -> np.ndarray:
    """Return predicted class numbers (N,)."""
    return classifier.predict(x.astype(np.float32)).argmax(axis=1)


def draw(
    out: Path,
    images: Mapping[str, np.ndarray],
    purified: Mapping[str, np.ndarray],
    predicted: Mapping[str, Mapping[str, np.ndarray]],
    p_values: Mapping[str, np.ndarray],
    p_purified: Mapping[str, np.ndarray],
) -> None:
    """Draw images with predicted labels, p-values and ROC curves (Figures 4, 3 and 7, 6 of the paper)."""
    some = np.arange(10)
    strips, labels = {}, {}
    for name, title in NAMES.items():
        for row, source, defence in ((title, images, "none"), (f"{title}, purified", purified, "PixelDefend")):
            strips[row] = to_levels(source[name][some])
            labels[row] = [str(label) for label in predicted[defence][name][some]]
    figures.image_strips(out / "images.png", strips, labels, [str(label) for label in predicted["none"]["clean"][some]])
    before, after = ({NAMES[name]: p for name, p in values.items()} for values in (p_values, p_purified))
    figures.p_value_histograms(out / "p-values.png", before, after, bins=20)
    figures.roc_curves(out / "roc.png", p_values["clean"], attacks_of(before), attacks_of(after))


def table(results: Mapping[str, Any]) -> str:
    """Return a Markdown table of each defence's accuracies and the detector's AUROC, in percent."""
    columns = list(NAMES)
    lines = ["| accuracy, % | " + " | ".join(NAMES.values()) + " | strongest attack |", "| --- |" + " --: |" * 7]
    for defence, row in results["accuracy"].items():
        cells = [*(row[name] for name in columns), min(attacks_of(row).values())]
        lines.append(f"| {defence} | " + " | ".join(f"{100 * value:.1f}" for value in cells) + " |")
    aurocs = [f"{100 * results['detection_auroc'][name]:.1f}" for name in columns if name != "clean"]
    lines.append("| *detection, AUROC* | | " + " | ".join(aurocs) + " | |")
    return "\n".join(lines) + "\n"


def report(results: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    undefended, purified = (attacks_of(results["accuracy"][name]) for name in ("none", "PixelDefend"))
    margins = ", ".join(f"{NAMES[name]} {100 * (purified[name] - undefended[name]):+.1f}" for name in undefended)
    model = results["density_model"]
    return f"""# PixelDefend on digits

{table(results)}
Purified against undefended, in points: {margins}.

{results["images"]} test images of scikit-learn's digits, a convolutional classifier, seed {results["seed"]}.
The attacks see the classifier without a defence, eps {results["eps_attack"]} of 255 levels; eps_defend is {
        results["eps_defend"]
    }.
The score purifier adds noise of standard deviation {results["sigma"]} and removes it, in one pass of `digits-score`.
The adaptive threshold, {results["adaptive_threshold_bits_per_dim"]:.3f} bits/dim, was chosen on {VALIDATION} other
test images; the detector was calibrated on {results["calibration_images"]}.
The density model has {model.get("test_bits_per_dim", float("nan")):.3f} bits/dim on the test set.
Detection: area under the ROC curve for detecting attacked images among clean test images by their p-values.
The demo took {results["seconds"]:.0f} s with art-pixeldefend {results["version"]}.

Images with the classifier's predictions; a prediction is green if it is that of the clean image (Figure 4 of the
paper):

![images](images.png)

p-values under the density model, before and after purification (Figures 3 and 7):

![p-values](p-values.png)

Detecting attacked images by their p-values, before and after purification (Figure 6):

![ROC curves](roc.png)
"""


def _say(verbose: bool, text: str) -> None:
    if verbose:
        print(text, file=sys.stderr, flush=True)
