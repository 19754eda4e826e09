"""The discretised logistic mixture over 256 levels (PixelCNN++, section 2.1; PixelDefend, Algorithm 1 line 7).

A sub-pixel has K logistic components with mixture weights pi, means m and scales s, in levels. Level z has the mass
between the edges z - 1/2 and z + 1/2, open-ended at 0 and 255, so the 256 masses sum to 1 by construction:

    P(z) = sum_k pi_k [sigmoid(b) - sigmoid(a)],  a = (z - 1/2 - m) / s,  b = (z + 1/2 - m) / s.

The difference is evaluated as sigmoid(b) sigmoid(-a) (1 - exp(a - b)), in logarithms: no cancellation, no underflow,
and an order of levels that survives rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256
HALF = (LEVELS - 1) / 2  # x in levels is (x - 127.5) / 127.5 to the network
MIN_LOG_SCALE = -7.0  # of the scale in network units, as in the paper's reference code
MAX_LOG_SCALE = 14.0  # so that any parameters give finite logarithms; flat over 256 levels long before
SMALLEST = 1e-200  # a best level less likely than that is looked for again in logarithms
STRIDE = 13  # divides the 65 levels of the paper's eps for Fashion-MNIST; 12 steps of the smallest scale are 103 of it
FAR = 600.0  # scales from a mean to a 13th level, at most: with those to the levels between no exponential overflows
MEAN_LIMIT = 1e6  # levels; a component as far away as that puts all its mass on the nearer end


def parameters_per_pixel(channels: int, mixtures: int) -> int:
    """Network outputs per pixel: 3 K for grey, 10 K for RGB (weights; means, scales; coefficients between channels)."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


class Components(NamedTuple):
    """The mixture of one sub-pixel or many: tensors (..., K). Weights are log-probabilities, the rest in levels."""

    log_weights: Tensor
    means: Tensor
    inverse_scales: Tensor

    def for_each_level(self) -> Components:
        """Room for one more axis of levels: (..., K) to (..., 1, K)."""
        return Components(*(part.unsqueeze(-2) for part in self))


def components(params: Tensor, x: Tensor, channel: int) -> Components:
    """The mixture of one channel, given the pixel's earlier channels.

    Args:
        params: network outputs (..., P), P of :func:`parameters_per_pixel`.
        x: the pixels' levels (..., C) as floats; only channels before ``channel`` are read.
        channel: 0 .. C - 1.

    Returns:
        Components with tensors (..., K). Means depend linearly on earlier channels (PixelCNN++, equation 3).
    """
    channels = x.shape[-1]
    mixtures = params.shape[-1] // parameters_per_pixel(channels, 1)
    part = params.unflatten(-1, (-1, mixtures))
    means = part[..., 1 + channel, :] * HALF + HALF
    first = 1 + 2 * channels + channel * (channel - 1) // 2
    for earlier in range(channel):
        means = means + torch.tanh(part[..., first + earlier, :]) * (x[..., earlier, None] - HALF)
    log_scales = part[..., 1 + channels + channel, :].clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
    return Components(
        F.log_softmax(part[..., 0, :], dim=-1), means.clamp(-MEAN_LIMIT, MEAN_LIMIT), torch.exp(-log_scales) / HALF
    )


def log_prob(mixture: Components, levels: Tensor) -> Tensor:
    """log P(levels), in nats.

    Args:
        mixture: components (..., K).
        levels: (...) as floats in 0..255.
    """
    z = levels.unsqueeze(-1)
    upper = (z + 0.5 - mixture.means) * mixture.inverse_scales
    lower = (z - 0.5 - mixture.means) * mixture.inverse_scales
    inside = torch.log(-torch.expm1(-mixture.inverse_scales))
    below = torch.where(z < LEVELS - 1, F.logsigmoid(upper), 0.0)
    above = torch.where(z > 0, F.logsigmoid(-lower), 0.0)
    inner = (z > 0) & (z < LEVELS - 1)
    return torch.logsumexp(mixture.log_weights + below + above + torch.where(inner, inside, 0.0), dim=-1)


def best_level(mixture: Components, low: Tensor, high: Tensor) -> Tensor:
    """The most likely level of a range; the lowest, should several be equally likely to the last bit.

    Evaluated in float64: conditionals that agree to rounding in float32 must give the same level.

    Args:
        mixture: components (M, K).
        low, high: ends of the range, both included: int64 (M,).

    Returns:
        Levels (M,), int64.
    """
    if not len(low):
        return low.clone()
    most, best = masses(mixture, low, high).max(dim=1)
    levels = low + best
    if (far := most < SMALLEST).any():
        levels[far] = best_level_in_logarithms(Components(*(part[far] for part in mixture)), low[far], high[far])
    return levels


def masses(mixture: Components, low: Tensor, high: Tensor) -> Tensor:
    """P(z) of the levels of ranges, in float64; below :data:`SMALLEST` any number as small as that.

    P(z) = sum_k w_k sinh(h) / (cosh(h) + cosh(c)), c = (z - m_k) / s_k, h = 1 / (2 s_k): nothing cancels. The
    exponential of c is a product: of that at every :data:`STRIDE`-th level and of what the levels between add.

    Args:
        mixture: components (M, K).
        low, high: ends of the ranges, both included: int64 (M,).

    Returns:
        Masses (M, L) from ``low`` on, L levels of the longest range; 0 beyond ``high``.
    """
    # (K, M), and (L, K, M) for the levels: long loops.
    log_weights, means, inverse_scales = (
        part.t().to(torch.float64, memory_format=torch.contiguous_format) for part in mixture
    )
    weights, half = log_weights.exp(), inverse_scales / 2
    length = high - low
    count = int(length.max()) + 1
    numbers = torch.arange(count, device=low.device)
    steps = numbers.to(torch.float64).view(-1, 1, 1)
    first = (low - means).mul_(inverse_scales)
    far = torch.addcmul(first, steps[::STRIDE], inverse_scales).clamp_(-FAR, FAR).exp_().unsqueeze(1)
    near = (steps[:STRIDE] * inverse_scales).exp_()
    below = torch.addcmul(half.cosh(), far, near, value=0.5).addcmul_(far.reciprocal(), near.reciprocal(), value=0.5)
    parts = torch.div(half.sinh_().mul_(weights), below, out=below).flatten(0, 1)[:count]
    total = parts.sum(dim=1).t().contiguous()
    # Levels 0 and 255 reach to infinity.
    lowest = (0.5 - means).mul_(inverse_scales).sigmoid_().mul_(weights).sum(dim=0)
    highest = (means - (LEVELS - 1.5)).mul_(inverse_scales).sigmoid_().mul_(weights).sum(dim=0)
    end = length.unsqueeze(1)
    total[:, 0] = torch.where(low == 0, lowest, total[:, 0])
    total.scatter_(1, end, torch.where((high == LEVELS - 1).unsqueeze(1), highest.unsqueeze(1), total.gather(1, end)))
    return total.masked_fill_(numbers > end, 0.0)


def best_level_in_logarithms(mixture: Components, low: Tensor, high: Tensor) -> Tensor:
    """Like :func:`best_level`, for any masses, and several times as slow."""
    wide = Components(*(part.double().unsqueeze(1) for part in mixture))
    z = low.unsqueeze(1) + torch.arange(int((high - low).max()) + 1, device=low.device)
    # Neighbouring levels share an edge: one logistic function an edge.
    edges = torch.cat([z[:, :1], z + 1], dim=1).double().sub_(0.5).unsqueeze(-1)
    t = (edges - wide.means) * wide.inverse_scales
    below = F.logsigmoid(t)
    above = below - t
    below = torch.where(edges > LEVELS - 1, 0.0, below)[:, 1:]
    above = torch.where(edges < 0, 0.0, above)[:, :-1]
    inside = torch.log(-torch.expm1(-wide.inverse_scales))
    inside = torch.where(((z > 0) & (z < LEVELS - 1)).unsqueeze(-1), inside, 0.0)
    logs = torch.logsumexp(wide.log_weights + below + above + inside, dim=-1)
    logs = torch.where(z <= high.unsqueeze(1), logs, -torch.inf)
    return low + logs.argmax(dim=1).to(low.dtype)
