"""The discretised logistic mixture over 256 levels (PixelCNN++, section 2.1; PixelDefend, Algorithm 1 line 7).

A sub-pixel has K logistic components with mixture weights pi, means m and scales s, in levels. Level z has the mass
between the edges z - 1/2 and z + 1/2, open-ended at 0 and 255, so the 256 masses sum to 1 by construction:

    P(z) = sum_k pi_k [sigmoid(b) - sigmoid(a)],  a = (z - 1/2 - m) / s,  b = (z + 1/2 - m) / s.

The difference is evaluated in logarithms as sigmoid(b) sigmoid(-a) (1 - exp(a - b)), which neither cancels nor
underflows, so that rounding does not change the order of the levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256
HALF = (LEVELS - 1) / 2  # the network's input is (x - HALF) / HALF for x in levels
MIN_LOG_SCALE = -7.0  # in units of the network's input, as in the paper's code
MAX_LOG_SCALE = 14.0  # keeps logarithms finite for any parameters; such components are flat over 256 levels
SMALLEST = 1e-200  # if the best level is less likely than this, the levels are compared in logarithms instead
STRIDE = 13  # divides the 65 levels of the paper's eps for Fashion-MNIST
FAR = 600.0  # largest distance in scales of every STRIDE-th level from a mean, so that no exponential overflows
MEAN_LIMIT = 1e6  # levels; a component this far away has all its mass on level 0 or 255


def parameters_per_pixel(channels: int, mixtures: int) -> int:
    """Network outputs per pixel, 3 K for grey and 10 K for RGB: weights; means, scales; coefficients of channels."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


class Components(NamedTuple):
    """Mixtures of one or several sub-pixels: tensors (..., K). Weights are log-probabilities, the others in levels."""

    log_weights: Tensor
    means: Tensor
    inverse_scales: Tensor

    def for_each_level(self) -> Components:
        """Insert an axis for levels: (..., K) to (..., 1, K)."""
        return Components(*(part.unsqueeze(-2) for part in self))


def components(params: Tensor, x: Tensor, channel: int) -> Components:
    """The mixtures of one channel, given the earlier channels of the same pixels.

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
    """The most likely level of each range; the lowest of several whose computed probabilities are equal.

    Evaluated in float64, so that parameters that agree up to rounding in float32 give the same level.

    Args:
        mixture: components (M, K).
        low, high: ends of the ranges, both included: int64 (M,).

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
    """P(z) of every level z of each range, in float64. Masses below :data:`SMALLEST` are not accurate.

        P(z) = sum_k w_k sinh(h) / (cosh(h) + cosh(c)),  c = (z - m_k) / s_k,  h = 1 / (2 s_k)

    Nothing cancels. exp(c) is computed as a product of two factors, one for every :data:`STRIDE`-th level and one for
    the distance from it, which needs fewer exponentials.

    Args:
        mixture: components (M, K).
        low, high: ends of the ranges, both included: int64 (M,).

    Returns:
        Masses (M, L) from ``low`` on, L levels of the longest range; 0 beyond ``high``.
    """
    # Shapes (K, M) and (L, K, M): PyTorch is fastest with a long last axis.
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
    # Levels 0 and 255 are open-ended.
    lowest = (0.5 - means).mul_(inverse_scales).sigmoid_().mul_(weights).sum(dim=0)
    highest = (means - (LEVELS - 1.5)).mul_(inverse_scales).sigmoid_().mul_(weights).sum(dim=0)
    end = length.unsqueeze(1)
    total[:, 0] = torch.where(low == 0, lowest, total[:, 0])
    total.scatter_(1, end, torch.where((high == LEVELS - 1).unsqueeze(1), highest.unsqueeze(1), total.gather(1, end)))
    return total.masked_fill_(numbers > end, 0.0)


def best_level_in_logarithms(mixture: Components, low: Tensor, high: Tensor) -> Tensor:
    """The most likely level of each range, as :func:`best_level`, also for masses that underflow; much slower."""
    wide = Components(*(part.double().unsqueeze(1) for part in mixture))
    z = low.unsqueeze(1) + torch.arange(int((high - low).max()) + 1, device=low.device)
    # Neighbouring levels share an edge, so one logistic function per edge suffices.
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
