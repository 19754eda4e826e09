"""The base class of purifiers: value ranges, layouts, dtypes, batches, random draws and backward passes."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from art_pixeldefend.batches import map_batches
from art_pixeldefend.levels import UNIT, ClipValues, Images, as_tensor, check_clip_values
from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.precision import full_float32
from art_pixeldefend.validation import all_or_none, check_bool, check_choice, check_count, check_seed

GRADIENTS = ("identity", "exact", "implicit")

# A function of a batch of images and the position of its first image in the whole input.
BatchFunction = Callable[[Tensor, int], Tensor]
# Applies a function to the slices of the input that make up its batches, and concatenates the results.
MapBatches = Callable[[Callable[[slice], Tensor]], Tensor]


class BatchGenerator:
    """Draw random numbers for a batch, from an independent stream for each image.

    An image's stream is a function of ``seed`` and its position only, so that results do not depend on how images are
    divided into batches. Numbers are drawn on the CPU in float32: they are the same on every device.

    Args:
        seed: of the call.
        positions: of each image in the whole input.
        device: of the numbers.
        dtype: of the numbers.

    Example:
        >>> whole = BatchGenerator(seed=1, positions=range(4)).normal((3, 8, 8))
        >>> last = BatchGenerator(seed=1, positions=range(2, 4)).normal((3, 8, 8))
        >>> whole.shape, torch.equal(whole[2:], last)
        (torch.Size([4, 3, 8, 8]), True)
    """

    def __init__(
        self,
        seed: int,
        positions: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._seed, self._positions, self._device, self._dtype = seed, positions, device, dtype

    def __len__(self) -> int:
        return len(self._positions)

    @cached_property
    def _streams(self) -> list[np.random.Generator]:
        """The streams, made at the first draw: many purifiers draw nothing."""
        return [np.random.default_rng([self._seed, position]) for position in self._positions]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers (N, *shape), ``shape`` being the shape for one image."""
        return self._draw(shape, np.random.Generator.standard_normal)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draw numbers uniform in [0, 1), (N, *shape), ``shape`` being the shape for one image."""
        return self._draw(shape, np.random.Generator.random)

    def subset(self, index: Tensor) -> BatchGenerator:
        """Return a generator for some of the images, given by a mask or indices, that continues their streams."""
        chosen = torch.arange(len(self), device="cpu")[index.cpu()].tolist()
        generator = BatchGenerator(self._seed, [self._positions[i] for i in chosen], self._device, self._dtype)
        generator._streams = [self._streams[i] for i in chosen]
        return generator

    def _draw(self, shape: Sequence[int], draw: Any) -> Tensor:
        numbers = np.empty((len(self), *shape), np.float32)
        for i, stream in enumerate(self._streams):
            numbers[i] = draw(stream, numbers.shape[1:], np.float32)
        return torch.from_numpy(numbers).to(self._device, self._dtype)


class StraightThrough(torch.autograd.Function):
    """Forward: ``function(x)``. Backward: the identity (BPDA, Athalye et al. 2018, arXiv:1802.00420)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``function(x)``, which must be a new tensor of the shape of ``x``."""
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for ``x``."""
        return gradients[0], None


class Exact(torch.autograd.Function):
    """Forward: ``function`` of ``x`` batch by batch. Backward: its exact gradient.

    If one batch holds all images, its activations are kept for the backward pass, as by autograd. Otherwise only ``x``
    is kept and the batches are computed again one by one: memory does not grow with the number of images, or of draws
    that are averaged. ``function`` must return the same values each time. Model parameters get no gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: BatchFunction, batches: MapBatches) -> Tensor:
        """Return ``function`` of all batches of ``x``, concatenated."""
        ctx.save_for_backward(x)
        ctx.function, ctx.batches, ctx.kept = function, batches, None

        def values(part: slice) -> Tensor:
            if len(x[part]) < len(x):
                return function(x[part], part.start)
            ctx.kept = inputs_and_outputs(function, x, 0)
            return ctx.kept[1].detach()

        return batches(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient for ``x``."""
        (x,) = ctx.saved_tensors

        def gradient(part: slice) -> Tensor:
            kept, ctx.kept = ctx.kept, None  # its memory is freed by the first backward pass
            if kept is None or len(x[part]) < len(x):
                kept = inputs_and_outputs(ctx.function, x[part], part.start)
            inputs, outputs = kept
            return torch.autograd.grad(outputs, inputs, gradients[0][part])[0]

        return ctx.batches(gradient), None, None


def inputs_and_outputs(function: BatchFunction, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return ``x`` as a leaf of a new autograd graph, and ``function`` of it."""
    with torch.enable_grad():
        inputs = x.detach().requires_grad_()
        return inputs, function(inputs, start)


class Purifier(PreprocessorPyTorch):
    """Base class of the purifiers: ART preprocessors that remove perturbations from images.

    A subclass implements :meth:`purify` for a batch of images in [0, 1] and declares what it can do by class
    attributes (or properties):

    - ``stochastic``: whether :meth:`purify` draws random numbers.
    - ``gradients``: the backward passes it supports, a subset of ``("identity", "exact", "implicit")``; all but
      ``"identity"`` are autograd's derivative of what :meth:`purify` returns.
    - ``model``: the image model it uses, if any: images are purified on its device, in evaluation mode.
    - ``image_shape``: the (C, H, W) that images must have; by default the model's. Without one, images are taken for
      NHWC if their last axis has 1 or 3 entries and their second one has not, unless ``channels_first`` says which.

    A subclass with arguments of its own sets them as attributes before it calls ``super().__init__``, names them in
    ``params`` and checks them in ``_check_params``.

    Args:
        clip_values: (minimum, maximum) of the images, as numbers or as arrays that broadcast over an image.
        batch_size: most images in memory at a time.
        apply_fit: purify in the classifier's training, too.
        apply_predict: purify in prediction, and so in attacks.
        verbose: show a progress bar.
        gradient: ``"identity"`` passes gradients on unchanged (BPDA, Athalye et al. 2018, arXiv:1802.00420);
            ``"exact"`` differentiates the computation, with the random numbers of the forward pass. For more images
            than ``batch_size`` it computes each batch again in the backward pass instead of keeping all activations.
            A differentiable function of images in [0, 1] that approximates the purifier, such as a
            :class:`~art_pixeldefend.attacks.Surrogate`, lends it its derivative.
        seed: of the random numbers. None draws a new one from torch's global generator at each call; with an integer,
            the result is a function of the seed and an image's position in the input, whatever ``batch_size``, up to
            rounding.
        device_type: ``"gpu"`` or ``"cpu"``: where a model that is loaded by path or name goes. A model that is passed
            stays where it is.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> class AddNoise(Purifier):
        ...     stochastic, gradients = True, ("identity", "exact")
        ...
        ...     def purify(self, x, generator):
        ...         return (x + 0.1 * generator.normal(x.shape[1:])).clamp(0, 1)
        >>> purified, _ = AddNoise(clip_values=(0, 255), seed=1)(np.zeros((2, 1, 4, 4), np.uint8))
        >>> purified.dtype, purified.shape
        (dtype('uint8'), (2, 1, 4, 4))
    """

    params = ["clip_values", "batch_size", "verbose", "gradient", "seed"]
    stochastic: bool = False
    gradients: tuple[str, ...] = ("identity",)
    model: Any = None
    channels_first: bool | None = None
    recomputed = True  # in the backward pass of several batches, so that their activations need not be kept
    clips_input: bool = True  # images are clipped to ``clip_values``, with a warning, before ``purify`` gets them
    precision: torch.dtype = torch.float32  # the least precise dtype of the images that ``purify`` gets

    def __init__(
        self,
        clip_values: ClipValues = (0.0, 1.0),
        batch_size: int = 128,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        gradient: str | Callable[[Tensor], Tensor] = "identity",
        seed: int | None = None,
        device_type: str = "gpu",
    ) -> None:
        check_choice("device_type", device_type, ("gpu", "cpu"))
        super().__init__(device_type=device_type, is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.clip_values = clip_values
        self.batch_size = batch_size
        self.verbose = verbose
        self.gradient = gradient
        self.seed = seed
        self._warned = False
        self._streams: tuple[int, Sequence[int]] | None = None
        self._check_params()

    @abstractmethod
    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """Purify one batch.

        Args:
            x: images (N, C, H, W) in [0, 1], float32 or float64, on the model's device.
            generator: of all random numbers, with one stream for each image.

        Returns:
            Images of the shape of ``x``; if ``gradient`` is ``"exact"``, differentiable with respect to ``x``.
        """

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images; None for any shape."""
        return None if self.model is None else self.model.image_shape

    def forward(self, x: Tensor, y: Any | None = None) -> tuple[Tensor, Any | None]:
        """Purify images; autograd passes through as ``gradient`` says.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) of any dtype. Values outside ``clip_values`` are clipped, with a
                warning the first time; the clipping's gradient is the identity.
            y: labels, returned as they are.

        Returns:
            Images of the shape, dtype and device of ``x``; and ``y``.

        Raises:
            ValueError: naming ``x``: a wrong shape, NaN or infinity, or values more than ten ranges outside
                ``clip_values``.
        """
        return self.purified(x, self.clip_values), y

    def purified(self, x: Tensor, clip_values: ClipValues = UNIT) -> Tensor:
        """Purify images of a given value range, whatever the purifier's own: as :meth:`forward` otherwise."""
        images = Images(self.image_shape, clip_values, self.channels_first)
        found = images.check(x)
        if found and self.clips_input and not self._warned:
            self._warned = True
            outside = f"images have values outside clip_values {images.shown}, which are clipped: {found}"
            warnings.warn(outside, stacklevel=3)
        seed, positions = self._streams_of(len(x))

        def unit(part: Tensor) -> Tensor:
            device = part.device if self.model is None else self.model.device
            dtype = torch.promote_types(part.dtype if part.is_floating_point() else torch.float32, self.precision)
            values = images.to_unit(part)
            if self.clips_input:
                values = StraightThrough.apply(values, lambda values: values.clamp(0, 1))
            return values.to(device, dtype)

        def purify(part: Tensor, start: int) -> Tensor:
            values = unit(part)
            generator = BatchGenerator(seed, positions[start : start + len(part)], values.device, values.dtype)
            return images.from_unit(self.purify(values, generator), like=part)

        def approximate(part: Tensor, start: int) -> Tensor:
            assert callable(self.gradient)
            return images.from_unit(self.gradient(unit(part)), like=part)

        def batches(function: Callable[[slice], Tensor]) -> Tensor:
            def batch(positions: Tensor) -> Tensor:
                start = int(positions[0]) if len(positions) else 0
                return function(slice(start, start + len(positions)))

            with self._evaluating():
                return map_batches(
                    batch, torch.arange(len(x), device="cpu"), self.batch_size, verbose=self.verbose, what="purify"
                )

        differentiated = x.requires_grad and torch.is_grad_enabled()
        if differentiated and self.gradient in GRADIENTS[1:]:
            if not self.recomputed:
                return batches(lambda part: purify(x[part], part.start))
            return Exact.apply(x, purify, batches)
        with torch.no_grad():
            result = batches(lambda part: purify(x[part], part.start))
        if not differentiated:
            return result
        if callable(self.gradient):
            surrogate = Exact.apply(x, approximate, batches)
            return result + (surrogate - surrogate.detach())
        return StraightThrough.apply(x, lambda _: result)

    def __call__(self, x: Any, y: Any | None = None) -> tuple[Any, Any | None]:
        """Purify arrays, for estimators of any framework.

        Args:
            x: images as for :meth:`forward`, as an array or nested sequences. A tensor is passed to :meth:`forward`.
            y: labels, returned as they are.

        Returns:
            Images of the shape and dtype of ``x``; and ``y``.

        Raises:
            ValueError: as :meth:`forward`.
        """
        if isinstance(x, Tensor):
            return self.forward(x, y)
        with torch.no_grad():
            purified, _ = self.forward(as_tensor(x))
        return purified.cpu().numpy().astype(np.asarray(x).dtype, copy=False), y

    def estimate_gradient(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """Return the gradient for ``x``, for estimators of other frameworks.

        It is ``grad`` for ``gradient="identity"``; for ``"exact"`` images are purified once more, without a seed with
        new random numbers.
        """
        return grad if self.gradient == "identity" else super().estimate_gradient(x, grad)

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name.

        Raises:
            ValueError: naming the parameter that is not as described; all of them are left as they were.
        """
        with all_or_none(self):
            super().set_params(**kwargs)

    @contextmanager
    def drawing(self, seed: int, positions: Sequence[int]) -> Iterator[None]:
        """Fix the random numbers of all calls in the context, whatever ``self.seed`` is.

        Attacks use it to replay draws, and to give an image the same draws whatever batch it is in.

        Args:
            seed: of the calls.
            positions: of each image, as for :class:`BatchGenerator`. In a call with k times as many images, of which
                each k neighbours are the same, as from :class:`PurifiedModel`, they are at ``k * position + 0..k-1``.
        """
        before, self._streams = self._streams, (seed, positions)
        try:
            yield
        finally:
            self._streams = before

    def _streams_of(self, count: int) -> tuple[int, Sequence[int]]:
        """The seed and the images' positions of a call with ``count`` images."""
        if self._streams is None:
            return self._call_seed(), range(count)
        seed, positions = self._streams
        if count == len(positions):
            return seed, positions
        if not positions or count % len(positions):
            raise ValueError(
                f"x must hold a multiple of {len(positions)} images, the positions of drawing, got {count}"
            )
        copies = count // len(positions)
        return seed, [copies * position + copy for position in positions for copy in range(copies)]

    def _call_seed(self) -> int:
        """Return the seed of a call's random numbers."""
        if self.stochastic and self.seed is None:
            return int(torch.randint(2**62, (), device="cpu"))
        return self.seed or 0

    def _evaluating(self) -> AbstractContextManager[None]:
        """Disable dropout, reduced precision and autocast for the duration of the context."""
        return self.model.evaluating() if isinstance(self.model, ImageModel) else full_float32()

    def _check_params(self) -> None:
        self.clip_values = check_clip_values(self.clip_values)
        self.batch_size = check_count("batch_size", self.batch_size)
        check_bool("verbose", self.verbose)
        if not callable(self.gradient) and self.gradient not in self.gradients:
            supported = " or ".join(map(repr, self.gradients))
            raise ValueError(f"gradient must be {supported} for {type(self).__name__}, got {self.gradient!r}")
        self.seed = check_seed("seed", self.seed)

    def __repr__(self) -> str:
        settings = {name: getattr(self, name) for name in signature(type(self)).parameters if name in self.params}
        shown = [f"{name}={_in_a_line(value)}" for name, value in settings.items()]
        return f"{type(self).__name__}({', '.join(shown)})"


def _in_a_line(value: Any) -> str:
    """The representation of an argument, that of a module without its layers."""
    if isinstance(value, ImageModel):
        return value.summary
    return f"{type(value).__name__}(...)" if isinstance(value, nn.Module) else repr(value)
