"""Purification by a deep image prior: the image that an untrained network fits before it fits the perturbation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from art_pixeldefend.levels import ClipValues
from art_pixeldefend.purifiers.base import BatchGenerator, Purifier
from art_pixeldefend.validation import check_attributes, check_count, check_number, check_probability

SKIP_CHANNELS = 4  # of the connections between encoder and decoder
SMALLEST = 4  # pixels of the shorter side of an image
MOST_SCALES = 5
SLOPE = 0.2  # of the leaky ReLUs


class DeepImagePrior(Purifier):
    """Replace each image by the output of an untrained network that is fitted to it and stopped early.

    A convolutional encoder-decoder with random weights and a fixed random input fits the structure of a natural image
    faster than a perturbation (deep image prior: Ulyanov, Vedaldi and Lempitsky 2018, arXiv:1711.10925; as a defence in
    Jalal et al. 2017, arXiv:1712.09196). The fit stops, for each image, at a mean square error or after ``steps``.
    Larger perturbations need a larger ``error``, which removes more of the image. It needs no training data and no
    model, but is slow: every image has a network of its own. The networks of a batch are fitted together, by grouped
    convolutions.

    The network halves the image up to five times while no side falls below 4 pixels, and takes images of any shape.
    Unlike the published one for images of 512 x 512 pixels it has 16 channels instead of 128, learns twice as fast, and
    its input stays without noise.

    An image whose fit becomes NaN is returned unpurified, with a warning that counts such images.

    Args:
        error: mean square error between image and average output, in squares of the range from 0 to 1 that
            ``clip_values`` stand for, at which the fit of an image stops.
        steps: of the fit, at most. With ``error=0`` they alone stop it.
        clip_values, batch_size, apply_fit, apply_predict, verbose, seed, device_type: as in
            :class:`~art_pixeldefend.purifiers.base.Purifier`.
        channels: of the network.
        learning_rate: of Adam.
        decay: of the exponential moving average of the outputs, which is the result. It is smaller in the first steps.
            0 returns the last output.

    Raises:
        ValueError: naming the argument that is not as described; or ``x``, for images with a side below 4 pixels.

    Example:
        >>> import numpy as np
        >>> from art_pixeldefend import DeepImagePrior, datasets
        >>> x = datasets.load("digits").x_test[:4].astype(np.float32) / 255
        >>> purified, _ = DeepImagePrior(error=0.01, seed=0)(x)
        >>> bool((((purified - x) ** 2).mean((1, 2, 3)) <= 0.01).all())
        True
    """

    params = [*Purifier.params, "error", "steps", "channels", "learning_rate", "decay"]
    stochastic = True
    precision = torch.float64  # a fit magnifies rounding errors, which differ between batch sizes, by several orders

    def __init__(
        self,
        error: float = 0.007,
        steps: int = 500,
        clip_values: ClipValues = (0.0, 1.0),
        batch_size: int = 16,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        channels: int = 16,
        learning_rate: float = 0.02,
        decay: float = 0.9,
        seed: int | None = None,
        device_type: str = "gpu",
    ) -> None:
        self.error, self.steps, self.channels = error, steps, channels
        self.learning_rate, self.decay = learning_rate, decay
        super().__init__(clip_values, batch_size, apply_fit, apply_predict, verbose, seed=seed, device_type=device_type)

    @torch.inference_mode(False)
    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The average outputs of the fitted networks; ``x`` where a fit failed."""
        if min(x.shape[2:]) < SMALLEST:
            raise ValueError(f"x must have sides of at least {SMALLEST} pixels, got {tuple(x.shape[2:])}")
        result = x.clone()
        fit = _Fit(_Networks(x.shape[1:], self.channels), result.clone(), generator, self.learning_rate, self.decay)
        left, failed = torch.arange(len(x), device=x.device), 0  # the images whose fit goes on, the number of failures
        for step in range(self.steps if len(x) else 0):
            errors = fit.step(step)
            goes_on = (errors > self.error) & (step + 1 < self.steps)
            if goes_on.all():
                continue
            succeeded = ~goes_on & errors.isfinite()
            result[left[succeeded]] = fit.averages[succeeded]
            failed += int((~goes_on & ~errors.isfinite()).sum())
            left = left[goes_on]
            if not len(left):
                break
            fit.keep(goes_on)
        if failed:
            warnings.warn(
                f"the fit of {failed} of {len(x)} images failed; they are left unpurified. Lower learning_rate",
                stacklevel=2,
            )
        return result

    def _check_params(self) -> None:
        self.error = check_number("error", self.error, 0.0, 1.0)
        check_attributes(self, check_count, "steps", "channels")
        self.learning_rate = check_number("learning_rate", self.learning_rate)
        self.decay = check_probability("decay", self.decay)
        super()._check_params()


class _Fit:
    """Fit a network to each of N images, all in one step.

    Attributes:
        averages: moving averages of the outputs, (N, C, H, W).
    """

    def __init__(
        self, networks: _Networks, x: Tensor, generator: BatchGenerator, learning_rate: float, decay: float
    ) -> None:
        self._networks, self._x, self._decay = networks, x, decay
        self._weights = networks.weights(generator).requires_grad_()
        self._inputs = networks.inputs(generator)
        self._optimizer = torch.optim.Adam([self._weights], lr=learning_rate)
        self.averages = torch.zeros_like(x)

    def step(self, step: int) -> Tensor:
        """Update averages, then weights; return the averages' mean square errors (N,)."""
        with torch.enable_grad():
            outputs = self._networks.outputs(self._weights, self._inputs)
            # Each image has weights of its own: the gradient of the sum is that of its own error.
            (self._weights.grad,) = torch.autograd.grad(_errors(outputs, self._x).sum(), self._weights)
        outputs = outputs.detach()
        decay = min(self._decay, step / (step + 9))
        self.averages = decay * self.averages + (1 - decay) * outputs
        self._optimizer.step()
        return _errors(self.averages, self._x)

    def keep(self, which: Tensor) -> None:
        """Go on with some images, given by a mask (N,)."""
        self._x, self._inputs, self.averages = self._x[which], self._inputs[which], self.averages[which]
        state = self._optimizer.state[self._weights]
        state |= {name: state[name][which] for name in ("exp_avg", "exp_avg_sq")}
        self._weights.grad = None
        self._weights.data = self._weights.data[which]


def _errors(a: Tensor, b: Tensor) -> Tensor:
    """The mean square difference of each image, (N,)."""
    return (a - b).square().flatten(1).mean(1)


class _Networks:
    """The architecture of the networks; each of N images has weights (P,) of its own.

    It is the encoder-decoder with skip connections of Ulyanov et al. Layers of all images are computed together, as
    convolutions with a group, and a normalisation, for each image.
    """

    def __init__(self, image_shape: Sequence[int], channels: int) -> None:
        self._channels, height, width = image_shape
        self._width = channels
        self._sizes = [(height, width)]
        while len(self._sizes) == 1 or (len(self._sizes) <= MOST_SCALES and min(height, width) > 2 * SMALLEST - 2):
            height, width = math.ceil(height / 2), math.ceil(width / 2)
            self._sizes.append((height, width))
        self._shapes = list(self._layers())
        self._counts = [outputs * (inputs * kernel**2 + 2) for inputs, outputs, kernel in self._shapes]

    def _layers(self) -> Iterator[tuple[int, int, int]]:
        """(input channels, output channels, kernel) of every layer, in the order of :meth:`outputs`."""
        width = self._width
        for _ in self._sizes[1:]:
            yield width, SKIP_CHANNELS, 1
            yield width, width, 3
            yield width, width, 3
        for _ in self._sizes[1:]:
            yield width + SKIP_CHANNELS, width, 3
            yield width, width, 1
        yield width, self._channels, 1

    def weights(self, generator: BatchGenerator) -> Tensor:
        """Random weights (N, P): kernels of unit gain, scales of 1, shifts of 0."""
        parts = []
        for inputs, outputs, kernel in self._shapes:
            fan_in = inputs * kernel**2
            kernels = generator.normal((outputs, fan_in)) / math.sqrt(fan_in)
            ones = torch.ones_like(kernels[..., :1])
            parts.append(torch.cat([kernels, ones, 0 * ones], dim=2).flatten(1))
        return torch.cat(parts, dim=1)

    def inputs(self, generator: BatchGenerator) -> Tensor:
        """Random inputs (N, channels, H, W)."""
        return generator.uniform((self._width, *self._sizes[0]))

    def outputs(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """The images in [0, 1] that weights (N, P) make of inputs (N, channels, H, W)."""
        layers = iter(zip(self._shapes, weights.split(self._counts, dim=1), strict=True))
        skips = []
        x = inputs
        for _ in self._sizes[1:]:
            skips.append(_layer(x, *next(layers)))
            x = _layer(x, *next(layers), stride=2)
            x = _layer(x, *next(layers))
        for size, skip in zip(self._sizes[-2::-1], skips[::-1], strict=True):
            x = torch.cat([skip, F.interpolate(x, size, mode="bilinear")], dim=1)
            x = _layer(x, *next(layers))
            x = _layer(x, *next(layers))
        return _layer(x, *next(layers), last=True).sigmoid()


def _layer(x: Tensor, shape: tuple[int, int, int], weights: Tensor, stride: int = 1, last: bool = False) -> Tensor:
    """A convolution of x (N, C, H, W) with kernels of its own for each image, a normalisation and a leaky ReLU.

    The last layer has a shift, and neither normalisation nor ReLU.
    """
    inputs, outputs, kernel = shape
    count = len(x)
    kernels, scales, shifts = weights.unflatten(1, (outputs, -1)).split([inputs * kernel**2, 1, 1], dim=2)
    kernels = kernels.reshape(count * outputs, inputs, kernel, kernel)
    x = x.reshape(1, -1, *x.shape[2:])
    if last:
        x = F.conv2d(x, kernels, shifts.flatten(), groups=count)
    else:
        x = F.conv2d(x, kernels, stride=stride, padding=kernel // 2, groups=count)
        x = F.leaky_relu(F.batch_norm(x, None, None, scales.flatten(), shifts.flatten(), training=True), SLOPE)
    return x.view(count, outputs, *x.shape[2:])
