"""The paper's figures for a finished grid: strips, likelihoods, p-values, ROC curves, and the numbers in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.detectors.conformal import conformal_p_values
from art_pixeldefend.evaluation import figures
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Grid, Row
from art_pixeldefend.evaluation.paper.appendix_a import appendix_a
from art_pixeldefend.evaluation.paper.likelihoods import density_model, reference_scores, scores
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.threat import BLIND
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import to_levels
from art_pixeldefend.processes import ProcessGroup

DEFENCE = "pixeldefend"
NOISE = ATTACKS["rand"].title
CONTROL = "clean (control)"
KINDS = ("strips", "likelihoods", "p-values", "roc")  # of figures, one for each radius
REFERENCE = 1000  # p-values compare with at most this many images


def draw(stages: Stages, folder: str | PathLike[str], *, shown: int = 10, samples: int = 50) -> list[Path]:
    """Draw the figures of the grid's first blind PixelDefend row, one of each kind for each radius.

    ``strips-EPS`` (the paper's Figures 4, 10 and 11), ``likelihoods-EPS`` (2), ``p-values-EPS`` (3 and 7) and
    ``roc-EPS`` (6), and once ``samples`` (8 and 9), each as PNG and PDF; and ``detection.json`` with areas under the
    curve, mean bits per dimension and the counts of Appendix A. Images and likelihoods that are not stored yet are
    computed. Figure 5 takes long and is drawn by :func:`ascent.figure_5`.

    P-values compare with calibration images. ROC curves tell attacked from clean test images; the control curve tells
    the calibration images from them. If the grid's ``reference`` is "training", both compare with training images, as
    in the paper, and the control curve is that of the clean test images.

    Args:
        stages: of the grid.
        folder: for the figures.
        shown: images in a strip.
        samples: images drawn from the density model.

    Returns:
        The files drawn, whatever else is in the folder; none if the grid has no such row.
    """
    row = drawn_row(stages.grid)
    if row is None:
        return []
    folder = Path(folder)
    numbers = {str(eps): _of_radius(stages, row, eps, folder, shown) for eps in stages.grid.eps_of(row)}
    drawn = {
        "test images": stages.splits["test"][0][:samples],
        "drawn from the density model": density_model(stages).sample(samples, seed=stages.grid.seed).cpu().numpy(),
    }
    figures.sample_sheets(folder / "samples", drawn)
    compared = {"images": stages.grid.reference, "count": len(reference_scores(stages, REFERENCE))}
    write_atomically(folder / "detection.json", json.dumps({"reference": compared, "eps": numbers}, indent=1) + "\n")
    names = ["samples", *(f"{kind}-{eps}" for kind in KINDS for eps in numbers)]
    return [folder / "detection.json", *(folder / f"{name}.{ending}" for name in names for ending in ("png", "pdf"))]


def score(stages: Stages, group: ProcessGroup) -> None:
    """Compute the likelihoods that :func:`draw` needs, shared out among the processes."""
    row = drawn_row(stages.grid)
    if row is None:
        return
    work: list[Callable[[], np.ndarray]] = [partial(reference_scores, stages, REFERENCE)]
    for eps in stages.grid.eps_of(row):
        for cells in _cells(stages, row, eps).values():
            work += [
                partial(scores, stages, cell, start, size) for cell in cells for start, size in _chunks(stages, row)
            ]
    for compute in group.shard(work):
        compute()
    group.wait()


def drawn_row(grid: Grid) -> Row | None:
    """Return the row that :func:`draw` shows, if the grid has one."""
    return next((row for row in grid.rows if row.defence == DEFENCE and row.threat == BLIND), None)


def check_reference(stages: Stages) -> None:
    """Check that no figure would show images that it also compares with.

    Raises:
        ValueError: naming ``images``, if the row drawn has more than the density model's test images.
    """
    row = drawn_row(stages.grid)
    if row is None or stages.grid.reference == "training" or stages.count(row) <= stages.most_reported:
        return
    if stages.count(row) > (most := len(stages.data.test(density_model(stages)).x)):
        raise ValueError(
            f"images of {row.name} must be at most {most} where figures are drawn, whose p-values compare with the "
            f"other test images, got {stages.count(row)}"
        )


def _of_radius(stages: Stages, row: Row, eps: int, folder: Path, shown: int) -> dict[str, Any]:
    """Draw the figures of one radius and return their numbers."""
    cells, reference = _cells(stages, row, eps), reference_scores(stages, REFERENCE)
    before, after = ({n: _of_chunks(stages.defended, stages, pair[i]) for n, pair in cells.items()} for i in (0, 1))
    likelihoods = [
        {n: _of_chunks(partial(scores, stages), stages, pair[i]) for n, pair in cells.items()} for i in (0, 1)
    ]
    p_values, p_purified = ({n: conformal_p_values(-s, -reference) for n, s in some.items()} for some in likelihoods)
    nats = -math.log(2) * math.prod(stages.data.image_shape)  # of a bit per dimension
    bits = {name: [likelihoods[i][name] / nats for i in (0, 1)] for name in cells}
    _strips(stages, row, before, after, folder / f"strips-{eps}", shown)
    y = stages.data.y_test[: len(before[CLEAN])]
    predict = stages.classifier(row).predict
    errors = {name: float((predict(x).argmax(axis=1) != y).mean()) for name, x in before.items()}
    figures.likelihood_densities(folder / f"likelihoods-{eps}", {name: b[0] for name, b in bits.items()}, errors)
    figures.p_value_histograms(folder / f"p-values-{eps}", p_values, p_purified, bins=25)
    attacked, purified = ({n: s for n, s in some.items() if n != CLEAN} for some in likelihoods)
    negatives, control = likelihoods[0][CLEAN], reference
    if stages.grid.reference == "training":
        negatives, control = control, negatives
    areas = figures.roc_curves(folder / f"roc-{eps}", negatives, {CONTROL: control, **attacked}, purified)
    return {
        "auroc": {name: area for name, area in areas.items() if name != CONTROL},
        "auroc_control": areas[CONTROL],
        "auroc_purified": {n: figures.auroc(negatives, s) for n, s in purified.items()},
        "bits_per_dim": {name: [float(b.mean()) for b in pair] for name, pair in bits.items()},
    } | (
        {"appendix_a": appendix_a(stages.grid.dataset, bits[CLEAN][0], bits[NOISE][0], errors[CLEAN], errors[NOISE])}
        if NOISE in bits
        else {}
    )


def _cells(stages: Stages, row: Row, eps: int) -> dict[str, tuple[Cell, Cell]]:
    """Return the row's cells of one radius by the title of the attack, each without the defence and with it."""
    names = {CLEAN: (CLEAN, 0)} | {ATTACKS[name].title: (name, eps) for name in stages.grid.attacks_of(row)}
    return {title: (Cell(replace(row, defence="none"), *of), Cell(row, *of)) for title, of in names.items()}


def _chunks(stages: Stages, row: Row) -> list[tuple[int, int]]:
    """Return start and size of each chunk."""
    count, chunk = stages.count(row), stages.grid.chunk
    return [(start, min(chunk, count - start)) for start in range(0, count, chunk)]


def _of_chunks(of: Callable[[Cell, int, int], np.ndarray], stages: Stages, cell: Cell) -> np.ndarray:
    """Return all of a cell's images, or all of their scores."""
    return np.concatenate([of(cell, start, size) for start, size in _chunks(stages, cell.row)])


def _strips(stages: Stages, row: Row, before: dict, after: dict, path: Path, shown: int) -> None:
    """Draw strips of attacked images above purified ones, with the classifier's predictions."""
    strips, labels = {}, {}
    classifier, names = stages.classifier(row), stages.data.classes
    for attack in before:
        for kind, images in ((attack, before[attack]), ("purified", after[attack])):
            name = kind if kind == attack else f"{attack},\npurified"
            strips[name] = to_levels(images[:shown])
            labels[name] = [names[i] for i in classifier.predict(images[:shown]).argmax(axis=1)]
    truth = stages.data.y_test[: len(labels[CLEAN])]  # there may be fewer than that many
    figures.image_strips(path, strips, labels, [names[i] for i in truth])
