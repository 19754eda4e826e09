"""Training of background models, which know what any image has in common but not what it shows."""

from __future__ import annotations

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp.model import PixelCNNpp
from art_pixeldefend.validation import check_probability


class BackgroundLoss:
    """The loss that trains a background model for a likelihood ratio (Ren et al. 2019, arXiv:1906.02845, section 3).

    It is the model's own loss on images of which some sub-pixels, chosen at random at each step, were moved by a random
    number of levels (modulo 256).

    Args:
        rate: the probability of a sub-pixel to be moved; 0.1 to 0.3 in the paper.

    Raises:
        ValueError: naming ``rate``.

    Example:
        >>> import tempfile
        >>> from art_pixeldefend import datasets
        >>> from art_pixeldefend.models.training import Settings, train
        >>> x, model = datasets.load("digits").x_train, PixelCNNpp((1, 8, 8), filters=4, resnets=1)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     background = train(model, BackgroundLoss(0.2), x, Settings(steps=2), run, device="cpu", verbose=False)
        >>> background.provenance["steps"]
        2
    """

    def __init__(self, rate: float = 0.2) -> None:
        self.rate = check_probability("rate", rate)

    def __call__(self, model: PixelCNNpp, batch: Tensor) -> Tensor:
        """The mean bits per dimension of levels ``batch`` (N, C, H, W) after the change, a scalar."""
        return model.loss(self.mutate(batch))

    def mutate(self, levels: Tensor) -> Tensor:
        """Move random sub-pixels of levels (N, C, H, W), uint8, by torch's global random numbers."""
        moved = torch.rand(levels.shape, device=levels.device) < self.rate
        shift = torch.randint(0, 256, levels.shape, device=levels.device, dtype=torch.uint8)
        return torch.where(moved, levels + shift, levels)  # uint8 wraps around
