"""Compare feature squeezing, PixelDefend and both in front of your classifier under your attack.

    python benchmarks/vs_feature_squeezing.py CLASSIFIER DATA --attack fgsm --eps 8 --pixel-cnn fashion-mnist

CLASSIFIER is a TorchScript file (``torch.jit.save``), a file written by ``classifiers.save``, or ``module:function``
for a function that returns a ``torch.nn.Module``. It takes images in [0, 1] and returns logits. DATA is a name or path
as for ``art-pixeldefend train``. The attack is a name of this package or the import path of an ART attack. It sees the
classifier without defences; its images are rounded to 8 bits and clipped to the ball.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import classifiers, datasets
from art_pixeldefend.attacks import ATTACKS, Clipped, make_attack
from art_pixeldefend.evaluation.paper.grids import defences
from art_pixeldefend.evaluation.preprocessors import Sequential, preprocessor
from art_pixeldefend.evaluation.table import wilson
from art_pixeldefend.purifiers import PixelDefend

UNIT = (0.0, 1.0)


def main(
    classifier: Annotated[str, typer.Argument(help="TorchScript file, .safetensors file, or module:function")],
    data: Annotated[str, typer.Argument(help="digits, fashion-mnist, cifar-10, or an .npz with test labels")],
    pixel_cnn: Annotated[str, typer.Option(help="density model: a bundled name or a path")],
    attack: Annotated[str, typer.Option(help=f"{', '.join(ATTACKS)}, or an import path")] = "fgsm",
    arguments: Annotated[str, typer.Option(help="the attack's arguments, as JSON")] = "{}",
    eps: Annotated[int, typer.Option(help="radius of the attack, in levels")] = 8,
    eps_defend: Annotated[int, typer.Option(help="radius of the purification, in levels")] = 32,
    bits: Annotated[int, typer.Option(help="bits per sub-pixel after squeezing")] = 3,
    limit: Annotated[int, typer.Option(help="test images, from the first on")] = 100,
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA")] = None,
) -> None:
    """Print accuracy and time per image for each defence."""
    images = datasets.load(data, data_dir)
    x, y = images.x_test[:limit].astype(np.float32) / 255, images.y_test[:limit]
    estimator = PyTorchClassifier(
        classifiers.load_module(classifier),
        nn.CrossEntropyLoss(),
        images.image_shape,
        len(images.classes),
        clip_values=UNIT,
    )
    labels = (
        np.eye(len(images.classes), dtype=np.float32)[y] if attack in ATTACKS and ATTACKS[attack].true_labels else None
    )
    attacked = attack_of(attack, estimator, eps, json.loads(arguments)).generate(x, labels)
    squeezing = preprocessor(defences(eps_defend, bits)["feature-squeezing"])
    purifier = PixelDefend(clip_values=UNIT, eps=eps_defend, pixel_cnn=pixel_cnn)
    print(f"| defence | clean | {attack}, eps {eps} | 95% interval | ms per image |\n|---|---|---|---|---|")
    for name, steps in {
        "none": [], "feature squeezing": [squeezing], "PixelDefend": [purifier],
        "PixelDefend, then squeezing": [purifier, squeezing],
    }.items():  # fmt: skip
        print(line(name, Sequential(steps), estimator, x, attacked, y), flush=True)


def line(
    name: str, defence: Sequential, estimator: PyTorchClassifier, x: np.ndarray, attacked: np.ndarray, y: np.ndarray
) -> str:
    """One row of the table."""
    clean = defence(x)[0]  # not timed: the first call compiles
    began = time.perf_counter()
    defended = defence(attacked)[0]
    seconds = (time.perf_counter() - began) / len(x)
    right = [int((estimator.predict(images).argmax(axis=1) == y).sum()) for images in (clean, defended)]
    low, high = wilson(right[1], len(y))
    accuracies = " | ".join(f"{100 * r / len(y):.1f}" for r in right)
    return f"| {name} | {accuracies} | {100 * low:.1f} to {100 * high:.1f} | {1000 * seconds:.1f} |"


def attack_of(name: str, estimator: PyTorchClassifier, eps: int, arguments: dict[str, Any]) -> EvasionAttack:
    """Build an attack of this package, or one of ART with the given arguments.

    Raises:
        typer.BadParameter: if ``name`` is neither.
    """
    if name in ATTACKS:
        return make_attack(name, estimator, eps, **arguments)
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f": {error}" if module else ""
        raise typer.BadParameter(
            f"--attack must be one of {', '.join(ATTACKS)}, or the import path of an ART attack, got {name!r}{reason}"
        ) from None
    return Clipped(found(estimator, **arguments), eps=eps)


if __name__ == "__main__":
    typer.run(main)
