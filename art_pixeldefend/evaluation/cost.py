"""About how long a grid will take: what is missing, times what a piece of it takes here."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from art_pixeldefend import classifiers
from art_pixeldefend.attacks.budget import bim_steps
from art_pixeldefend.evaluation.grid import CLEAN
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.table import title

SAMPLE = 4  # images that are timed
# Gradient passes an image, as measured with the paper's ResNet; BIM's follow from the radius.
PASSES = {CLEAN: 0, "rand": 0, "fgsm": 1, "deepfool": 60, "deepfool-l2": 100, "cw": 300, "cw-art": 3000}


def estimate(stages: Stages) -> str:
    """Cells to do, and minutes to within a factor of two or three, measured with an untrained network."""
    grid, data = stages.grid, stages.data
    lines, seconds, seen = [], 0.0, set()
    gradient = {name: _gradient_seconds(stages, name) for name in {row.network for row in grid.rows}}
    defence = {name: _defence_seconds(stages, name) for name in {row.defence for row in grid.rows}}
    for row in stages.classifiers():
        if not stages.trained(row):
            recipe = stages.training(row)["recipe"]
            passes = recipe["steps"] * recipe["batch_size"] * _passes_a_step(row.training, grid.delta_of(row))
            lines.append(f"to train: {title(row)}, {recipe['steps']} steps")
            seconds += passes * gradient[row.network]
    for cell in grid.cells():
        kept = stages.store.read("cells", stages.cell_key(cell)) if stages.calibrated(cell.row) else None
        if kept and "error" not in kept:
            lines.append(f"done:   {cell.name}")
            continue
        lines.append(f"to do:  {cell.name}")
        passes = bim_steps(cell.eps) if cell.attack == "bim" else PASSES[cell.attack]
        count = stages.count(cell.row)
        through = cell.row.threat == "through"
        attack = (cell.row.classifier, cell.attack, cell.eps, cell.row.defence if through else "")
        if attack not in seen:
            seen.add(attack)
            seconds += count * passes * (gradient[cell.row.network] + through * defence[cell.row.defence])
        seconds += count * (defence[cell.row.defence] + gradient[cell.row.network] / 3)
    lines.append(f"about {seconds / 60:.0f} minutes for {len(data.x_test[: grid.images])} images a cell on one process")
    return "\n".join(lines) + "\n"


def _passes_a_step(training: str, delta: float | None) -> float:
    """Gradient passes for an image of a batch, a part of which adversarial training attacks."""
    steps = {"adversarial-fgsm": 1, "adversarial-bim": bim_steps(delta or 0)}
    return 1 + (1 + steps[training]) * classifiers.RATIO if training in steps else 1.0


def _gradient_seconds(stages: Stages, network: str) -> float:
    """Per image, in a batch of 32."""
    data = stages.data
    sizes = stages.grid.sizes.get(network, {})
    model = classifiers.build(network, data.image_shape, len(data.classes), **sizes)
    x, y = np.resize(stages.clean(0, 32), (32, *data.image_shape)), np.eye(len(data.classes), dtype=np.float32)
    classifier = classifiers.as_art(model)
    return _timed(lambda: classifier.loss_gradient(x, y[np.zeros(32, int)])) / 32


def _defence_seconds(stages: Stages, defence: str) -> float:
    """Per image."""
    steps = stages.grid.defences.get(defence, ())
    plain = [(path, {k: v for k, v in arguments.items() if k != "threshold"}) for path, arguments in steps]
    made = stages.build(plain)
    x = stages.clean(0, SAMPLE)
    return _timed(lambda: made(x)) / len(x) if made is not None else 0.0


def _timed(compute: Callable[[], object]) -> float:
    """Seconds of the second run: the first one warms up."""
    compute()
    began = time.perf_counter()
    compute()
    return time.perf_counter() - began
