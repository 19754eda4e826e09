"""A derivative for greedy decoding within a window, which is piecewise constant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from art_pixeldefend.levels import TOP, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, mixture

EDGE = 4.0  # levels over which the window's edges fall
STRIDE = 4  # levels between the ones of which the mean is taken
CHUNK = 16  # images whose gradients are computed at a time


class SoftWindow(torch.autograd.Function):
    """Forward: purified images. Backward: the derivative of means in a window with soft edges.

    PixelDefend's p_i, the most likely level within eps of x_i given the sub-pixels p before i, is replaced by

        m_i = sum over z of z w_i(z) / sum over z of w_i(z),
        w_i(z) = P(z | p before i) sigmoid((eps - (z - x_i)) / EDGE) sigmoid((eps + (z - x_i)) / EDGE).

    m_i depends on x_i directly, through the window, and on all earlier sub-pixels of x through p, implicitly. Of the
    implicit dependence one step is followed: d m_i / d x = direct_i + sum over j of (d m_i / d p_j) direct_j.
    The backward pass costs one forward and one backward pass of the density model. Images that are returned as they
    are pass their gradients on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, purified: Tensor, model: PixelCNNpp, eps: int) -> Tensor:
        """Return ``purified`` images in [0, 1].

        Args:
            x: images (N, C, H, W) in [0, 1].
            purified: levels (N, C, H, W) that PixelDefend makes of ``x``.
            model: the density model.
            eps: radius in levels.
        """
        ctx.save_for_backward(x, purified)
        ctx.model, ctx.eps = model, eps
        return purified.to(x.dtype) / TOP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient for ``x``."""
        x, purified = ctx.saved_tensors
        pieces = zip(x.split(CHUNK), purified.split(CHUNK), gradients[0].split(CHUNK), strict=True)
        found = [_gradient(ctx.model, ctx.eps, *piece) for piece in pieces]
        unchanged = (to_levels(x) == purified).flatten(1).all(1)[:, None, None, None]
        return torch.where(unchanged, gradients[0], torch.cat(found)), None, None, None


def _gradient(model: PixelCNNpp, eps: int, x: Tensor, purified: Tensor, gradient: Tensor) -> Tensor:
    """The gradient for images ``x`` of (``gradient`` * means).sum(), means and images both in [0, 1]."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    with model.evaluating(), torch.enable_grad():
        centre = (x.detach().to(dtype) * TOP).requires_grad_()
        earlier = purified.to(dtype).requires_grad_()
        params = model.mixture_parameters(earlier)
        weighted = (gradient.to(dtype) * window_means(params, earlier, centre, eps)).sum()
        direct, implicit = torch.autograd.grad(weighted, (centre, earlier))
        followed = (implicit * window_means(params.detach(), earlier.detach(), centre, eps)).sum()
        return (direct + torch.autograd.grad(followed, centre)[0]).to(x.dtype)


def window_means(params: Tensor, levels: Tensor, centre: Tensor, eps: int) -> Tensor:
    """Means of conditional distributions within soft windows, in levels, (N, C, H, W); differentiable.

    Args:
        params: mixture parameters (N, H, W, P) of :meth:`PixelCNNpp.mixture_parameters`.
        levels: (N, C, H, W), those of a pixel's earlier channels are conditioned on.
        centre: of the windows, in levels (N, C, H, W).
        eps: their radius in levels.
    """
    count = int((eps + 3 * EDGE) // STRIDE)
    offsets = STRIDE * torch.arange(-count, count + 1, device=centre.device, dtype=centre.dtype)
    pixels, means = levels.movedim(1, -1), []
    for channel in range(levels.shape[1]):
        middle = centre[:, channel, ..., None]
        z = (middle.detach() + offsets).clamp(0, TOP)
        parts = mixture.components(params, pixels, channel).for_each_level()
        distance = z - middle
        window = F.logsigmoid((eps - distance) / EDGE) + F.logsigmoid((eps + distance) / EDGE)
        means.append(((mixture.log_prob(parts, z) + window).softmax(-1) * z).sum(-1))
    return torch.stack(means, 1)
