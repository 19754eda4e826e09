"""Draw the pictures of the README and the documentation: purified images with predictions, and ROC curves of detection.

    python examples/purified_images.py

attacks the first Fashion-MNIST test images with ART's BIM within 8 of 255 levels, purifies them, detects attacked ones,
and writes ``purified.png``, ``purifiers.png`` and ``detection.png`` into ``docs/images``. It takes a minute or two and
downloads nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from art.attacks.evasion import BasicIterativeMethod
from matplotlib.figure import Figure

from art_pixeldefend import (
    DeepImagePrior,
    ManifoldProjection,
    PixelDefend,
    PixelDefendDetector,
    ScorePurifier,
    classifiers,
    datasets,
)  # fmt: skip
from art_pixeldefend.attacks import ATTACKS, make_attack
from art_pixeldefend.evaluation import figures

FOLDER = Path(__file__).parents[1] / "docs" / "images"


def main(folder: Path = FOLDER) -> None:
    """Draw all pictures."""
    purification(folder)
    detection(folder)


def purification(folder: Path, shown: int = 10) -> None:
    """Attack images, purify them with every purifier, and draw them with the classifier's predictions."""
    data = datasets.load("fashion-mnist-500")
    x, y = data.x_test[:shown].astype(np.float32) / 255, data.y_test[:shown]
    classifier = classifiers.as_art(classifiers.load("fashion-mnist-resnet"))
    attack = BasicIterativeMethod(classifier, eps=8 / 255, eps_step=1 / 255, max_iter=10, verbose=False)
    rows = {"clean": x, "attacked": attack.generate(x, y)}
    purifiers = {
        "PixelDefend": PixelDefend(eps=32, pixel_cnn="fashion-mnist-40x5"),
        "ScorePurifier": ScorePurifier("fashion-mnist-score", sigma=0.25, seed=0),
        "Manifold-\nProjection": ManifoldProjection("fashion-mnist-vae"),
        "DeepImage-\nPrior": DeepImagePrior(seed=0),
    }
    rows |= {name: purifier(rows["attacked"])[0] for name, purifier in purifiers.items()}
    answers = {name: classifier.predict(images).argmax(axis=1) for name, images in rows.items()}

    def draw(name: str, titles: Mapping[str, str]) -> None:
        figure = Figure(figsize=(shown, 1.25 * len(titles)), layout="constrained")
        for axes, (row, title) in zip(figure.subplots(len(titles), shown), titles.items(), strict=True):
            for axis, image, answer, label in zip(axes, rows[row], answers[row], y, strict=True):
                axis.imshow(image[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_title(data.classes[answer], fontsize=8, color="green" if answer == label else "red")
                axis.set(xticks=[], yticks=[])
            axes[0].set_ylabel(title)
        figure.savefig(folder / name, dpi=90)

    draw("purified.png", {"clean": "clean", "attacked": "attacked", "PixelDefend": "purified"})
    draw("purifiers.png", {name: name for name in rows})


def detection(folder: Path, images: int = 100, attacks: tuple[str, ...] = ("rand", "fgsm", "bim", "cw")) -> None:
    """Attack images, and draw ROC curves of telling them from clean ones by their p-values, before purification."""
    data, detector = datasets.load("fashion-mnist-500"), PixelDefendDetector("fashion-mnist")
    classifier = classifiers.as_art(classifiers.load("fashion-mnist-resnet"))
    detector.fit(data.calibration(detector.pixel_cnn).x.astype(np.float32) / 255)
    x, y = data.x_test[:images].astype(np.float32) / 255, data.y_test[:images]
    attacked = {
        ATTACKS[name].title: make_attack(name, classifier, eps=8).generate(x, np.eye(10)[y]) for name in attacks
    }
    p_values = {name: detector.detect(images)[0]["p_values"] for name, images in {"clean": x, **attacked}.items()}
    figures.roc_curves(folder / "detection.png", p_values.pop("clean"), p_values, title="attacked within 8 levels")


if __name__ == "__main__":
    main()
