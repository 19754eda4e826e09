"""An HTML page on a detector's calibration: scores, realised false-alarm rates, images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.figure import Figure

from art_pixeldefend import __version__
from art_pixeldefend.detectors import ConformalDetector
from art_pixeldefend.detectors.conformal import conformal_p_values
from art_pixeldefend.detectors.false_alarms import FalseAlarms, false_alarms
from art_pixeldefend.evaluation import page
from art_pixeldefend.image_files import ImageSet

LEVELS = (0.01, 0.05, 0.1)
SHOWN = 8  # images at either end of the scores


def write_report(
    path: str | PathLike[str],
    detector: ConformalDetector,
    images: ImageSet,
    *,
    title: str = "Calibration",
    names: Sequence[str] | None = None,
) -> None:
    """Write the page, one file without references to others.

    Realised false-alarm rates are those of :func:`.detectors.false_alarms.false_alarms`. The QQ plot and the histogram
    show one of its splits: half of the images calibrate, the others are tested.

    Args:
        path: the HTML file.
        detector: a detector that was fitted to ``images``.
        images: the calibration images, grey or RGB; others are not shown.
        title: of the page.
        names: of the scores; by default their classes with their parameters.

    Raises:
        ValueError: if the detector has not been fitted.
        OSError: if the file cannot be written.
    """
    detector._check_fitted()
    scores = detector.calibration_scores
    assert scores is not None
    names = [repr(score) for score in detector._scores] if names is None else list(names)
    units = [score.unit for score in detector._scores]
    order = np.random.default_rng(0).permutation(len(scores))
    fitted, tested = order[: len(order) // 2], order[len(order) // 2 :]
    levels = sorted({*LEVELS, detector.alpha})
    found = false_alarms(detector, levels)
    sections = [
        page.paragraph(
            f"{len(scores)} images; scores: {', '.join(names)}"
            + (f", combined by {detector.combine}" if len(names) > 1 else "")
            + f"; level {detector.alpha:g}. art-pixeldefend {__version__}."
        ),
        page.heading("False alarms"),
        *_table(found, levels, len(scores)),
    ]
    for k, (name, unit) in enumerate(zip(names, units, strict=True)):
        plots = [_histogram(scores[:, k], unit, detector._sides[k], detector.alpha / len(names))]
        if len(fitted):
            ties = np.random.default_rng(1).random(len(tested))
            p_values = conformal_p_values(scores[tested, k], scores[fitted, k], two_sided=detector._sides[k], ties=ties)
            plots.append(_quantiles(p_values))
        captions, drawn = zip(*plots, strict=True)
        sections += [page.heading(name), page.charts(map(_png, drawn), "; ".join(captions))]
        sections += _extremes(detector, scores, k, images, unit)
    page.write_page(path, title, sections)


def _table(found: Sequence[FalseAlarms], levels: Sequence[float], count: int) -> list[str]:
    if not found:
        return [page.paragraph(f"{count} images are too few to measure false alarms.")]
    rows = [
        [
            f"{each.alpha:g}",
            f"{each.rate:.2%}",
            f"{_share(each.counts.min(), each)} to {_share(each.counts.max(), each)}",
            f"{_share(each.split_interval[0], each)} to {_share(each.split_interval[1], each)}",
            f"{each.inside:.0%}",
        ]
        for each in found
    ]
    left_out = sorted(set(levels) - {each.alpha for each in found})
    note = f" Half of the images are too few for {', '.join(f'{a:g}' for a in left_out)}." if left_out else ""
    return [
        page.table(["level", "images flagged", "range over splits", "95% interval", "splits within"], rows),
        page.paragraph(
            f"Mean of {len(found[0].counts)} random splits: half of the images calibrate, {found[0].tested} others are "
            "tested. The interval is that of the number flagged in a split if p-values are uniform; combined p-values "
            f"of bonferroni and harmonic are larger than that, and flag fewer.{note}"
        ),
    ]


def _share(count: int, found: FalseAlarms) -> str:
    return f"{count / found.tested:.1%}"


def _histogram(scores: np.ndarray, unit: str, two_sided: bool, alpha: float) -> tuple[str, Figure]:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(scores, bins=min(60, max(10, len(scores) // 15)), color="#4878a8")
    ends = [1 - alpha / (1 + two_sided)] + ([alpha / 2] if two_sided else [])
    for end in ends:
        axes.axvline(
            np.quantile(scores, end), color="#c62828", ls="--", label=f"p = {alpha:.3g}" if end > 0.5 else None
        )
    axes.set_xlabel(f"score ({unit})" if unit else "score")
    axes.set_ylabel("calibration images")
    axes.legend()
    return "Histogram of the scores", figure


def _quantiles(p_values: np.ndarray) -> tuple[str, Figure]:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    expected = (np.arange(len(p_values)) + 0.5) / len(p_values)
    axes.plot([0, 1], [0, 1], color="#888888", lw=1)
    axes.plot(expected, np.sort(p_values), ".", ms=3, color="#4878a8")
    axes.set_xlabel("quantile of the uniform distribution")
    axes.set_ylabel("p-value")
    axes.set_title("p-values of half of the images, calibrated on the others", fontsize=10)
    return "QQ plot of the p-values", figure


def _extremes(detector: ConformalDetector, scores: np.ndarray, k: int, images: ImageSet, unit: str) -> list[str]:
    """Pictures of the images with the highest and the lowest scores."""
    if len(images.levels) != len(scores) or images.levels.shape[1] not in (1, 3):
        return []
    order = np.argsort(scores[:, k], kind="stable")
    count = min(SHOWN, len(order) // 2)
    parts = []
    for title, chosen in (("Highest scores", order[::-1][:count]), ("Lowest scores", order[:count])):
        shown = [(images.levels[i], images.names[i], f"{scores[i, k]:.3g}", None) for i in chosen]
        rows = [shown[start : start + 4] for start in range(0, count, 4)]
        parts += [page.paragraph(f"{title} ({unit})"), page.image_rows(rows)]
    return parts


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
