"""Figures of attacked, purified and detected images, from plain arrays.

Every function takes a path that ends in ``.png`` or ``.pdf``; for a path without an ending it writes both. Numbers of
figures are those in PixelDefend (Song et al., ICLR 2018).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde
from sklearn.metrics import roc_auc_score, roc_curve

from art_pixeldefend.files import write_atomically
from art_pixeldefend.pictures import as_picture, tiled

RIGHT, WRONG = "#1a7f37", "#c62828"


def image_strips(
    path: str | PathLike[str],
    strips: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]] | None = None,
    truth: Sequence[str] | None = None,
) -> None:
    """Draw rows of images, with a name left of each row and a label under each image (Figures 1, 4, 10 and 11).

    Args:
        path: of the file.
        strips: levels (N, C, H, W) by the row's name; every row has the same number of images.
        labels: the predicted label of each image, by the row's name; other rows have no labels.
        truth: the true labels (N,): correct predictions are then green, wrong ones red.

    Raises:
        ValueError: if rows or labels differ in number.
    """
    counts = {len(images) for images in strips.values()} | {len(names) for names in (labels or {}).values()}
    if len(counts | ({len(truth)} if truth is not None else set())) != 1 or not (count := counts.pop()):
        raise ValueError("strips, labels and truth must all have the same number of images, at least 1")
    figure = Figure(figsize=(0.9 + 0.95 * count, 1.15 * len(strips) + 0.1), layout="constrained")
    axes = figure.subplots(len(strips), count, squeeze=False)
    for (name, images), row in zip(strips.items(), axes, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for i, ax in enumerate(row):
            ax.imshow(as_picture(images[i]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_xticks([]), ax.set_yticks([])
            if labels and name in labels:
                label = labels[name][i]
                colour = "black" if truth is None else RIGHT if label == truth[i] else WRONG
                ax.set_xlabel(label, color=colour, fontsize=8, labelpad=2)
    _save(figure, path)


def sample_sheets(path: str | PathLike[str], sheets: Mapping[str, np.ndarray], columns: int = 10) -> None:
    """Draw sheets of images one below the other, each under its name (Figures 8 and 9).

    Args:
        path: of the file.
        sheets: levels (N, C, H, W) by name; N may differ.
        columns: images side by side.
    """
    tiles = {name: tiled(images, columns) for name, images in sheets.items()}
    heights = [tile.shape[1] / tile.shape[2] for tile in tiles.values()]
    figure = Figure(figsize=(6.4, 6.4 * sum(heights) + 0.4 * len(tiles)), layout="constrained")
    axes = figure.subplots(len(tiles), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, tile) in zip(axes, tiles.items(), strict=True):
        ax.imshow(as_picture(tile), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(name, fontsize=10)
        ax.axis("off")
    _save(figure, path)


def p_value_histograms(
    path: str | PathLike[str],
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None = None,
    bins: int = 50,
    columns: int = 3,
) -> None:
    """Draw a histogram of p-values for each kind of image, before and after purification (Figures 3 and 7).

    Args:
        path: of the file.
        before: p-values (N,) by the name of the attack, "clean" among them.
        after: p-values of the same images purified, by the same names; some names may be missing.
        bins: number of bins in the unit interval.
        columns: panels side by side.
    """
    figure, axes = _panels(len(before), columns)
    for (name, values), ax in zip(before.items(), axes, strict=True):
        ax.hist(values, bins=bins, range=(0, 1), density=True, color="#4477aa", alpha=0.75, label="not purified")
        if after is not None and name in after:
            ax.hist(
                after[name],
                bins=bins,
                range=(0, 1),
                density=True,
                histtype="step",
                color="#cc3311",
                lw=1.3,
                label="purified",
            )
        ax.axhline(1, color="black", lw=0.8, ls=":", label="uniform")
        ax.set(title=name, xlabel="p-value", ylabel="density", xlim=(0, 1))
    top = 1.05 * max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:  # the same scale, so that panels compare
        ax.set_ylim(0, top)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)


def roc_curves(
    path: str | PathLike[str],
    negatives: np.ndarray,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None = None,
    title: str = "attacked images",
) -> dict[str, float]:
    """Draw ROC curves of detecting attacked images by their low scores, with the area under each (Figure 6).

    Args:
        path: of the file.
        negatives: scores (M,) of images that were not attacked; log-likelihoods or p-values.
        before: scores (N,) of attacked images by the attack's name.
        after: scores of the same images purified; drawn in a second panel.
        title: of the first panel.

    Returns:
        The areas of ``before`` by name.
    """
    panels = {title: before} | ({"the same, purified\n(area < 0.5: likelier than clean)": after} if after else {})
    figure, axes = _panels(len(panels), columns=2, width=4.2, height=4.5)
    for (shown, scores), ax in zip(panels.items(), axes, strict=True):
        widths = np.linspace(1.2 + 1.1 * (len(scores) - 1), 1.2, len(scores))  # so that equal curves show side by side
        for (name, positives), width in zip(scores.items(), widths, strict=True):
            false_positives, true_positives, _ = roc_curve(*_labelled(negatives, positives))
            label = f"{name} ({auroc(negatives, positives):.2f})"
            ax.plot(false_positives, true_positives, lw=width, label=label)
        ax.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
        ax.set(title=shown, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        ax.legend(title="attack (area)", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    _save(figure, path)
    return {name: auroc(negatives, positives) for name, positives in before.items()}


def auroc(negatives: np.ndarray, positives: np.ndarray) -> float:
    """The probability that a positive scores below a negative, ties counted half; NaN if there are none of one kind."""
    if not len(negatives) or not len(positives):
        return math.nan
    return float(roc_auc_score(*_labelled(negatives, positives)))


def _labelled(negatives: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores of which high ones are positive, as scikit-learn takes them."""
    labels = np.repeat([0, 1], [len(negatives), len(positives)])
    return labels, -np.concatenate([negatives, positives])


def likelihood_densities(
    path: str | PathLike[str], bits: Mapping[str, np.ndarray], errors: Mapping[str, float] | None = None
) -> None:
    """Draw densities of bits per dimension for each kind of image (Figure 2).

    Args:
        path: of the file.
        bits: bits per dimension (N,) by name.
        errors: the classifier's error rate, 0..1, by the same names; shown in the legend.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = figure.subplots()
    finite = np.concatenate([np.asarray(values)[np.isfinite(values)] for values in bits.values()])
    margin = 0.1 * (np.ptp(finite) or 1.0)
    grid = np.linspace(finite.min() - margin, finite.max() + margin, 400)
    for name, values in bits.items():
        label = f"{name}: {100 * errors[name]:.0f}% error" if errors and name in errors else name
        ax.plot(grid, _density(values, grid), lw=1.4, label=label)
    ax.set(xlabel="bits per dimension", ylabel="density", ylim=(0, None))
    ax.legend(fontsize=8)
    _save(figure, path)


def certified_accuracy(path: str | PathLike[str], radii: Mapping[str, np.ndarray]) -> None:
    """Certified accuracy against the L2 radius, a curve for each smoothed classifier (Cohen et al. 2019, Figure 6).

    Args:
        path: of the file.
        radii: within which images certainly get their true class (N,), -inf for those that do not, by name.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    ax = figure.subplots()
    for name, values in radii.items():
        steps = np.unique(np.append(values[values >= 0], 0.0))
        accuracy = [100 * (values >= step).mean() for step in steps]
        # The accuracy at a radius holds from the next smaller one on, and is zero beyond the largest.
        ax.step([*steps, steps[-1]], [*accuracy, 0], where="pre", lw=1.4, label=name)
    ax.set(xlabel="L2 radius", ylabel="certified accuracy (%)", ylim=(0, 100), xlim=(0, None))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    _save(figure, path)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return a kernel density estimate, or a histogram if there are fewer than three or only equal values."""
    values = np.asarray(values)[np.isfinite(values)]
    if len(values) > 2 and np.ptp(values) > 0:
        return gaussian_kde(values)(grid)
    edges = np.append(grid, 2 * grid[-1] - grid[-2])
    return np.histogram(values, edges, density=True)[0] if len(values) else np.zeros_like(grid)


def _panels(count: int, columns: int = 3, width: float = 2.9, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _save(figure: Figure, path: str | PathLike[str]) -> None:
    path = Path(path)
    for target in [path] if path.suffix else [path.with_suffix(".png"), path.with_suffix(".pdf")]:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=target.suffix[1:], dpi=150)
        write_atomically(target, buffer.getvalue())
