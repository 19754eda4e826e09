"""A classifier behind a purifier, as one PyTorch module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from art_pixeldefend.purifiers.base import Purifier, StraightThrough
from art_pixeldefend.validation import check_choice, check_count

COMBINATIONS = ("logits", "softmax", "vote")


class PurifiedModel(nn.Module):
    """Purify images, classify them, and average over the purifier's random draws.

    It makes a purifier usable from tools that take a plain PyTorch model, and inside ``PyTorchClassifier``, where it
    gives attacks the gradients of expectation over transformation (EOT, Athalye et al. 2018, arXiv:1707.07397).
    Gradients pass through the purifier as its ``gradient`` argument says; second derivatives and ``torch.func`` are not
    supported. The purifier's ``clip_values``, ``apply_fit`` and ``apply_predict`` have no effect here: images are in
    [0, 1] and always purified.

    For evaluation use a purifier with ``seed=None``. With an integer, an image's draws depend on its position in the
    call, so that results change with the batches that a tool forms (AutoAttack, for example, drops images that it has
    fooled), and an attack can learn the draws.

    Args:
        model: a module from images in [0, 1], (N, C, H, W), to logits (N, classes).
        purifier: a :class:`Purifier`. Its image model, if it has one, becomes a submodule: it is moved by ``to`` and
            contained in ``state_dict``.
        runs: draws per image, purified and classified in one batch of N * runs images. A purifier that is not
            stochastic runs once, whatever ``runs`` is.
        combine: how the draws' logits become one row per image:

            - ``"logits"``: their mean.
            - ``"softmax"``: the log of the mean of their softmax probabilities p.
            - ``"vote"``: log((votes + p) / (runs + 1)), where votes counts the draws that predict a class: the class of
              most votes has the largest output, and p breaks ties. Votes are piecewise constant, so that gradients
              are those of ``"softmax"``.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import PixelDefend, datasets
        >>> x = torch.from_numpy(datasets.load("digits").x_test[:4]) / 255
        >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> robust = PurifiedModel(classifier, PixelDefend(eps=32, pixel_cnn="digits"))
        >>> robust(x).shape
        torch.Size([4, 10])
    """

    def __init__(self, model: nn.Module, purifier: Purifier, runs: int = 1, combine: str = "logits") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            inside = isinstance(getattr(model, "model", None), nn.Module)  # as ART's PyTorchClassifier has it
            hint = ": pass classifier.model" if inside else ""
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
        if not isinstance(purifier, Purifier):
            raise ValueError(f"purifier must be a Purifier, got {type(purifier).__name__}")
        check_choice("combine", combine, COMBINATIONS)
        self.model = model
        self.purifier = purifier
        if isinstance(purifier.model, nn.Module):
            self.add_module("purifier_model", purifier.model)
        self.runs = check_count("runs", runs)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, or log-probabilities, (N, classes) of images ``x`` (N, C, H, W) in [0, 1].

        Raises:
            ValueError: naming ``x``, as :meth:`Purifier.forward`, if it holds integers, or if it is not a tensor.
        """
        if self._modules.get("purifier_model") is not (
            self.purifier.model if isinstance(self.purifier.model, nn.Module) else None
        ):
            raise RuntimeError("the purifier's model was replaced: make a new PurifiedModel")
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"x must hold floating-point values in [0, 1], got dtype {x.dtype}")
        runs = self.runs if self.purifier.stochastic else 1
        # An image's draws are neighbours: with a seed they do not depend on the number of images.
        logits = self.model(self.purifier.purified(x.repeat_interleave(runs, 0) if runs > 1 else x))
        return combined(logits.unflatten(0, (len(x), runs)), self.combine)

    def extra_repr(self) -> str:
        """Return the arguments that are not modules."""
        return f"purifier={self.purifier!r}, runs={self.runs}, combine={self.combine!r}"


def combined(logits: Tensor, combine: str) -> Tensor:
    """Combine the logits of draws (N, runs, classes) to one row per image (N, classes); see :class:`PurifiedModel`."""
    if combine == "logits":
        return logits.mean(1)
    runs = logits.shape[1]
    log_p = logits.log_softmax(-1).logsumexp(1) - math.log(runs)
    if combine == "softmax":
        return log_p

    def votes(log_p: Tensor) -> Tensor:
        counts = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(1)
        return torch.logaddexp(counts.to(log_p.dtype).log(), log_p) - math.log(runs + 1)

    return StraightThrough.apply(log_p, votes)
