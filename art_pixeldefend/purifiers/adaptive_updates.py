"""The update rule of ADP: adversarial purification with score-based models (Yoon et al. 2021, arXiv:2106.06041)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from art_pixeldefend.validation import check_attributes, check_bool, check_count, check_number

Direction = Callable[[Tensor], Tensor]  # images (N, C, H, W) to the direction to move them in, of the same shape


@dataclass(frozen=True)
class AdaptiveStep:
    """The step sizes of ADP; the defaults are those of its code.

    For a direction g at images x, g' the direction at x + ``delta`` g, each image by itself gets the step size

        z = <g, g'> / <g, g>,  alpha = clip(rate delta / (1 - z), smallest, largest)

    and stops for good where alpha <= ``stop``. Where 1 - z is zero, alpha is the largest; where it is negative, alpha
    is the smallest, which stops the image; an image whose direction is zero stops. For the score of a Gaussian of
    variance v, 1 - z is delta / v and alpha is rate v: each step goes the fraction ``rate`` of the way to the mean.

    Args:
        rate: ADP's lambda.
        delta: length of the finite difference in units of g; it needs float32.
        stop: the step size at which an image stops.
        smallest, largest: bounds of the step sizes.
        detach: hold the step sizes constant in the backward pass. That takes less time, but the gradient is then an
            approximation, and an attack with it can make the defence look stronger than it is.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    rate: float = 0.05
    delta: float = 1e-3
    stop: float = 1e-3
    smallest: float = 1e-5
    largest: float = 0.1
    detach: bool = False

    def __post_init__(self) -> None:
        check_attributes(self, check_number, "rate", "delta", "largest", low=1e-12)
        check_attributes(self, check_number, "stop")
        check_attributes(self, check_number, "smallest", high=self.largest)
        check_bool("detach", self.detach)

    def sizes(self, g: Tensor, g_ahead: Tensor) -> Tensor:
        """Step sizes (N,) for directions g and g' (N, ...); 0 where g is zero."""
        squared = g.flatten(1).square().sum(1)
        # 1 - z from the difference itself: z is close to 1, and subtracting it from 1 would lose its digits.
        bend = (g * (g - g_ahead)).flatten(1).sum(1) / torch.where(squared > 0, squared, 1)
        scale = self.rate * self.delta
        alpha = (scale / bend.clamp_min(scale / self.largest)).clamp_min(self.smallest)
        return torch.where(bend < 0, self.smallest, alpha) * (squared > 0)


def adaptive_updates(
    x: Tensor, direction: Direction, steps: int = 10, rule: AdaptiveStep | None = None
) -> tuple[Tensor, Tensor]:
    """Move noisy images along a direction that removes noise, with a step size and a stop for each image.

    ADP's own network predicts minus the unit noise and is not divided by sigma: ``direction`` is then the network as it
    is. A score model gives the same as ``lambda x: sigma * model.score(x, sigma)``. Directions of another scale need
    another ``rate`` and other bounds.

    Images are never clipped here. ADP's code clips the noisy image and every step to [0, 1], which removes half of the
    noise wherever an image is black or white; it also changes the contrast at every step by mapping the range twice.

    Args:
        x: images (N, C, H, W) to which noise has been added.
        direction: evaluated twice a step, in the precision of ``x``.
        steps: most updates of an image.
        rule: the step sizes.

    Returns:
        The images, those that stopped exactly as they were at that step; and the number of updates of each, (N,).

    Example:
        >>> from art_pixeldefend.purifiers import Purifier
        >>> class Adp(Purifier):
        ...     stochastic = True
        ...
        ...     def purify(self, x, generator):
        ...         noisy = x + 0.25 * generator.normal(x.shape[1:])
        ...         return adaptive_updates(noisy, network)[0].clamp(0, 1)
        >>> network = torch.nn.Conv2d(1, 1, 3, padding=1)  # an NCSNv2 that predicts minus the unit noise
        >>> Adp(seed=0)(torch.zeros(2, 1, 8, 8))[0].shape
        torch.Size([2, 1, 8, 8])

        >>> noisy = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        >>> towards_zero, updates = adaptive_updates(noisy, lambda x: -x, steps=2, rule=AdaptiveStep(rate=0.1))
        >>> towards_zero.flatten().round(decimals=4).tolist(), updates.tolist()
        ([0.0, 0.81], [0, 2])
    """
    steps, rule = check_count("steps", steps), rule or AdaptiveStep()
    taken = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    alive = torch.arange(len(x), device=x.device)

    def step(some: Tensor) -> tuple[Tensor, Tensor]:
        g = direction(some)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not rule.detach):
            alpha = rule.sizes(g, direction(some + rule.delta * g))
        return some + alpha[:, None, None, None] * g, alpha

    for _ in range(steps):
        moved, alpha = checkpoint(step, x[alive], use_reentrant=False, preserve_rng_state=False)
        going = alpha > rule.stop
        alive = alive[going]
        if not len(alive):
            break
        x = x.index_copy(0, alive, moved[going])
        taken[alive] += 1
    return x, taken
