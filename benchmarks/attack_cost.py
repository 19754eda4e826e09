"""How many images ART's attacks purify for one image that withstands them.

    python benchmarks/attack_cost.py --out benchmarks/results/attack-cost.json

A preprocessor that returns its input counts the images that pass through it, forwards of gradient computations
included. The radius is so small that no image is fooled, and no attack stops early. ART's ``AutoAttack`` needs the
package ``multiprocess``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from art.attacks.evasion import (
    AutoAttack,
    AutoProjectedGradientDescent,
    BasicIterativeMethod,
    FastGradientMethod,
    ProjectedGradientDescent,
    SquareAttack,
)
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from published import facts_of_run
from torch import nn

from art_pixeldefend import datasets
from art_pixeldefend.files import write_atomically

EPS = 1e-4
ATTACKS: dict[str, Callable[[PyTorchClassifier], Any]] = {
    "FastGradientMethod": partial(FastGradientMethod, eps=EPS),
    "BasicIterativeMethod(max_iter=10)": partial(BasicIterativeMethod, eps=EPS, eps_step=EPS / 10, max_iter=10),
    "ProjectedGradientDescent": partial(ProjectedGradientDescent, eps=EPS, eps_step=EPS / 10),
    "AutoProjectedGradientDescent": partial(AutoProjectedGradientDescent, eps=EPS, eps_step=EPS / 10),
    "SquareAttack": partial(SquareAttack, eps=EPS),
    "AutoAttack": partial(AutoAttack, eps=EPS, eps_step=EPS / 10),
}


class Counter(PreprocessorPyTorch):
    """Returns its input and counts the images in it."""

    def __init__(self) -> None:
        super().__init__(is_fitted=True, apply_fit=False)
        self.images = 0

    def forward(self, x: torch.Tensor, y: Any = None) -> tuple[torch.Tensor, Any]:
        """The images as they are."""
        self.images += len(x)
        return x, y


def measure(images: int) -> dict[str, float]:
    """Images through the preprocessor for each image attacked, by attack."""
    torch.manual_seed(0)
    np.random.seed(0)  # ART draws from NumPy's generator
    data = datasets.load("digits")
    x_train, x = (levels.astype(np.float32) / 255 for levels in (data.x_train, data.x_test))
    model, counter = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Counter()
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=torch.optim.Adam(model.parameters(), 1e-2),
        clip_values=(0, 1), preprocessing_defences=[counter],
    )  # fmt: skip
    classifier.fit(x_train, data.y_train, nb_epochs=20)
    right = classifier.predict(x).argmax(axis=1) == data.y_test
    x, y = x[right][:images], data.y_test[right][:images]
    costs = {}
    for name, build in ATTACKS.items():
        attack, before = build(classifier), counter.images
        attacked = attack.generate(x, y)
        costs[name] = (counter.images - before) / len(x)
        if (classifier.predict(attacked).argmax(axis=1) != y).any():
            raise RuntimeError(f"{name} fooled an image, so its cost is not that of an image that withstands it")
    return costs


def main(
    images: Annotated[int, typer.Option(min=1, help="test images to attack")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Count the images for each attack with ART's default settings where none are shown."""
    result = {
        **facts_of_run("attack_cost.py"), "images": images, "purifications_per_image": measure(images),
    }  # fmt: skip
    typer.echo(json.dumps(result, indent=1))
    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
