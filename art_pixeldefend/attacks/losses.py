"""Losses that attacks maximise, as functions of logits: one number per row, larger where the attack is closer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("ce", "margin", "dlr")


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy of the labels, or minus that of the targets.

    Args:
        logits: (M, classes).
        y: labels (M,).
        target: classes (M,) that are attacked towards; None for any but ``y``.

    Returns:
        (M,).
    """
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The largest other logit, or the target's, minus the label's: positive where the label is not predicted.

    Arguments are those of :func:`cross_entropy`.
    """
    other = _largest_other(logits, y) if target is None else _of(logits, target)
    return other - _of(logits, y)


def dlr(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The difference of logits ratio, whatever the logits' scale (Croce and Hein 2020, arXiv:2003.01690).

        (max other z - z_y) / (z_1 - z_3),  with a target t:  (z_t - z_y) / (z_1 - (z_3 + z_4) / 2)

    with z_1 >= z_2 >= ... sorted. Arguments are those of :func:`cross_entropy`, for three classes at least, and four
    with a target.
    """
    largest = logits.topk(3 if target is None else 4, -1).values
    spread = largest[:, 0] - (largest[:, 2] if target is None else (largest[:, 2] + largest[:, 3]) / 2)
    return margin(logits, y, target) / (spread + 1e-12)


FUNCTIONS = dict(zip(NAMES, (cross_entropy, margin, dlr), strict=True))


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _largest_other(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf).max(1).values
