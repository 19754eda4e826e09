"""A derivative for greedy decoding within a window, which is piecewise constant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from art_pixeldefend.levels import TOP, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, mixture
from art_pixeldefend.models.pixelcnnpp.layers import kept_weights

EDGE = 4.0  # levels over which the window's edges fall
STRIDE = 4  # levels between the ones of which the mean is taken
CHUNK = 16  # images whose gradients are computed at a time


class SoftWindow(torch.autograd.Function):
    """Forward: purified images. Backward: the derivative of means in a window with soft edges.

    PixelDefend's p_i, the most likely level within eps of x_i given the sub-pixels p before i, is replaced by

        m_i = sum over z of z w_i(z) / sum over z of w_i(z),
        w_i(z) = P(z | p before i) sigmoid((eps - (z - x_i)) / EDGE) sigmoid((eps + (z - x_i)) / EDGE).

    z runs over every fourth level, from x_i - eps - 3 EDGE to x_i + eps + 3 EDGE; each one that is out of range counts
    as another level 0 or 255.
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
    with model.evaluating(), kept_weights(model), torch.enable_grad():
        earlier = purified.to(dtype).requires_grad_()
        means, direct = window_means(model.mixture_parameters(earlier), earlier, x.detach().to(dtype) * TOP, eps)
        (implicit,) = torch.autograd.grad(means, earlier, gradient.to(dtype))
    return ((gradient.to(dtype) + implicit) * direct).to(x.dtype)


def window_means(params: Tensor, levels: Tensor, centre: Tensor, eps: int) -> tuple[Tensor, Tensor]:
    """Means of conditional distributions within soft windows, and their derivatives with respect to the centres.

    Args:
        params: mixture parameters (N, H, W, P) of :meth:`PixelCNNpp.mixture_parameters`.
        levels: (N, C, H, W), those of a pixel's earlier channels are conditioned on.
        centre: of the windows, in levels (N, C, H, W).
        eps: their radius in levels.

    Returns:
        Both (N, C, H, W): the means in levels, which are differentiable in ``params`` and ``levels``; and derivatives,
        d m / d x = sum of z w(z) s(z) - m sum of w(z) s(z), where s = d log w / d x and w sums to 1.
    """
    count = int((eps + 3 * EDGE) // STRIDE)
    offsets = STRIDE * torch.arange(-count, count + 1, device=centre.device, dtype=centre.dtype)
    pixels, means, derivatives = levels.movedim(1, -1), [], []
    for channel in range(levels.shape[1]):
        middle = centre[:, channel, ..., None]
        z = (middle + offsets).clamp(0, TOP)
        above, below = (eps + z - middle) / EDGE, (eps - z + middle) / EDGE
        parts = mixture.components(params, pixels, channel).for_each_level()
        weights = (mixture.log_prob(parts, z) + F.logsigmoid(above) + F.logsigmoid(below)).softmax(-1)
        means.append((weights * z).sum(-1))
        with torch.no_grad():
            slopes = weights * (below.neg().sigmoid() - above.neg().sigmoid()) / EDGE
            derivatives.append((z * slopes).sum(-1) - means[-1] * slopes.sum(-1))
    return torch.stack(means, 1), torch.stack(derivatives, 1)
