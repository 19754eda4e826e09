"""Draw the pictures of the README and the documentation: images clean, attacked and purified, with predictions.

    python examples/purified_images.py

attacks the first Fashion-MNIST test images with ART's BIM within 8 of 255 levels, purifies them, and writes
``docs/images/purified.png`` and ``docs/images/purifiers.png``. It takes half a minute and downloads nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from art.attacks.evasion import BasicIterativeMethod
from matplotlib.figure import Figure

from art_pixeldefend import DeepImagePrior, ManifoldProjection, PixelDefend, ScorePurifier, classifiers, datasets

FOLDER = Path(__file__).parents[1] / "docs" / "images"


def main(folder: Path = FOLDER, *, shown: int = 10) -> None:
    """Attack, purify, draw."""
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


if __name__ == "__main__":
    main()
