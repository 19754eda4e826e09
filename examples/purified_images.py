"""Draw the README's picture: Fashion-MNIST images clean, attacked and purified, with a classifier's answers.

    python examples/purified_images.py

trains a small classifier, attacks the first test images with ART's BIM within 8 of 255 levels, purifies them with the
bundled ``fashion-mnist-40x5``, and writes ``docs/images/purified.png``. It takes a few minutes on two CPU cores.
"""

from pathlib import Path

import numpy as np
import torch
from art.attacks.evasion import BasicIterativeMethod
from art.estimators.classification import PyTorchClassifier
from matplotlib.figure import Figure
from torch import nn

from art_pixeldefend import PixelDefend, datasets

OUT = Path(__file__).parents[1] / "docs" / "images" / "purified.png"


def main(out: Path = OUT, *, epochs: int = 3, training_images: int = 54_000, shown: int = 10) -> None:
    """Train, attack, purify, draw."""
    data = datasets.load("fashion-mnist")
    classifier = train(data.x_train[:training_images], data.y_train[:training_images], epochs)
    clean = data.x_test[:shown].astype(np.float32) / 255
    attack = BasicIterativeMethod(classifier, eps=8 / 255, eps_step=1 / 255, max_iter=10, verbose=False)
    attacked = attack.generate(clean, data.y_test[:shown])
    purified, _ = PixelDefend(eps=32, pixel_cnn="fashion-mnist-40x5")(attacked)

    figure = Figure(figsize=(shown, 3.6), layout="constrained")
    rows = {"clean": clean, "attacked": attacked, "purified": purified}
    for axes, (name, images) in zip(figure.subplots(len(rows), shown), rows.items(), strict=True):
        answers = classifier.predict(images).argmax(axis=1)
        for axis, image, answer, label in zip(axes, images, answers, data.y_test[:shown], strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(data.classes[answer], fontsize=8, color="green" if answer == label else "red")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name)
    figure.savefig(out, dpi=90)


def train(x: np.ndarray, y: np.ndarray, epochs: int) -> PyTorchClassifier:
    """Train a small convolutional network on levels (N, 1, 28, 28)."""
    torch.manual_seed(0)
    np.random.seed(0)  # ART shuffles with NumPy's generator
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 28, 28), 10, optimizer=adam, clip_values=(0, 1))
    classifier.fit(x.astype(np.float32) / 255, y, batch_size=128, nb_epochs=epochs)
    model.eval()
    return classifier


if __name__ == "__main__":
    main()
