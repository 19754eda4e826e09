"""About how long a grid will take: what is missing, times what a piece of it takes here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from art_pixeldefend import classifiers
from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.attacks.budget import bim_steps
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Row
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.table import title

SAMPLE = 4  # images that are timed
# Gradient passes an image, as measured with the paper's ResNet; BIM's follow from the radius.
PASSES = {CLEAN: 0, "rand": 0, "fgsm": 1, "deepfool": 60, "deepfool-l2": 100, "cw": 300, "cw-art": 3000}


def estimate(stages: Stages) -> str:
    """Cells to do, and minutes to within a factor of two or three, measured with an untrained network."""
    pieces = _Pieces(stages)
    lines, seconds = [], 0.0
    for row in stages.classifiers():
        if not stages.trained(row):
            lines.append(f"to train: {title(row)}, {stages.recipe(row).steps} steps")
            seconds += pieces.training(row)
    for row in stages.uncalibrated():
        lines.append(f"to calibrate: {row.name}")
        seconds += pieces.calibration(row)
    for cell in stages.grid.cells():
        kept = stages.store.read("cells", stages.cell_key(cell)) if stages.calibrated(cell.row) else None
        if kept and "error" not in kept:
            lines.append(f"done:   {cell.name}")
            continue
        lines.append(f"to do:  {cell.name}")
        seconds += pieces.cell(cell)
    images = len(stages.data.x_test[: stages.grid.images])
    lines.append(f"about {seconds / 60:.0f} minutes for {images} images a cell on one process")
    return "\n".join(lines) + "\n"


class _Pieces:
    """Seconds of each piece of a grid; attacked images that rows, radii or thresholds share are charged once.

    Args:
        stages: of the grid.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        networks, defences = ({getattr(row, what) for row in stages.grid.rows} for what in ("network", "defence"))
        self.gradient = {name: _gradient_seconds(stages, name) for name in networks}
        self.defence = {name: _defence_seconds(stages, name) for name in defences | {"none"}}
        self._charged: set[tuple[Any, ...]] = set()

    def training(self, row: Row) -> float:
        """Of a row's classifier."""
        recipe, delta = self.stages.recipe(row), self.stages.grid.delta_of(row)
        return recipe.steps * recipe.batch_size * _passes_a_step(row.training, delta) * self.gradient[row.network]

    def calibration(self, row: Row) -> float:
        """Of a row's threshold: every attack on the bare classifier's validation images, alone and purified."""
        grid, count = self.stages.grid, len(self.stages.splits["reserve"][1])
        cells = [Cell(row.classifier, attack, eps) for attack in grid.attacks for eps in grid.eps_of(row)]
        each = self.defence[row.defence] + 2 * self._prediction(row)
        return sum(self._attack(cell, count, "reserve") + count * each for cell in cells)

    def cell(self, cell: Cell) -> float:
        """Of a cell: the attack, the defence, and the prediction."""
        count = self.stages.count(cell.row)
        return self._attack(cell, count, "test") + count * (self.defence[cell.row.defence] + self._prediction(cell.row))

    def _prediction(self, row: Row) -> float:
        return self.gradient[row.network] / 3

    def _attack(self, cell: Cell, count: int, split: str) -> float:
        row, through = cell.row, cell.row.threat == "through"
        radius = cell.eps if cell.attack != CLEAN and ATTACKS[cell.attack].uses_eps else 0
        attack = (split, row.classifier, cell.attack, radius, row.defence if through else "")
        if attack in self._charged:
            return 0.0
        self._charged.add(attack)
        passes = bim_steps(cell.eps) if cell.attack == "bim" else PASSES[cell.attack]
        return count * passes * (self.gradient[row.network] + through * self.defence[row.defence])


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
