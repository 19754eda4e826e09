"""Projection of images onto the range of a generator: invert and classify."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from art_pixeldefend.batches import map_batches
from art_pixeldefend.levels import ClipValues, Images, as_tensor
from art_pixeldefend.models.generator import Generator
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.base import BatchGenerator, Purifier
from art_pixeldefend.validation import check_attributes, check_choice, check_count, check_number

OPTIMIZERS = ("adam", "momentum")
BETAS = (0.9, 0.99)  # of Adam: with 0.999 the first, large gradients would shorten all steps of so short a run
RANK = 1e-4  # share of the largest eigenvalue of the Hessian below which a latent direction is taken to have no effect
ERRORS = 1e-8  # keeps Adam's square root differentiable at 0


class ManifoldProjection(Purifier):
    """Replace an image by the closest one that a generator makes (Robust Manifold Defense, invert and classify).

        z* = argmin over z of |G(z) - x|^2,  x* = G(z*)

    (Jalal, Ilyas, Daskalakis and Dimakis 2017, arXiv:1712.09196; Defense-GAN, Samangouei et al. 2018, arXiv:1805.06605,
    is the same with a GAN.) All restarts of all images of a batch are searched at once, each by the gradient of its own
    sum of squares: a result does not depend on the rest of the batch. The learning rate falls to 0 by a half cosine. Of
    an image's restarts the one with the smallest distance is kept. An image whose restarts all become NaN or infinite
    is returned unpurified, with a warning that counts such images.

    Images of the generator itself stay as they are, so that adversarial ones among them get through:
    :class:`~art_pixeldefend.attacks.OverpoweredAttack` searches for them.

    | Paper link: https://arxiv.org/abs/1712.09196

    Args:
        model: a :class:`Generator`, the name of a bundled one, or the path of one.
        steps: of the search.
        restarts: searches per image.
        learning_rate: of the first step. Defense-GAN's 10 belongs to the mean square; for the sum it is 10 / (C H W).
        optimizer: ``"adam"``, or ``"momentum"``, gradient descent with momentum.
        momentum: of ``"momentum"`` (Defense-GAN: 0.7).
        encode: begin the first search at the latents that the generator's encoder gives, all others at random; by
            default if there is an encoder.
        clip_values, batch_size, apply_fit, apply_predict, verbose, seed, device_type: as in
            :class:`~art_pixeldefend.purifiers.base.Purifier`. Without a random start nothing is drawn.
        gradient: ``"identity"``; ``"exact"``, through all steps, whose memory and time grow with ``steps``: for few;
            or ``"implicit"``, the derivative of z* by the implicit function theorem: exact where the search has
            converged, in L further backward passes for L latents.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import torch
        >>> from art_pixeldefend import ManifoldProjection, datasets
        >>> from art_pixeldefend.models.generator import VAE
        >>> x = datasets.load("digits").x_test[:4]  # uint8
        >>> purifier = ManifoldProjection(VAE((1, 8, 8), latent_size=4), clip_values=(0, 255), steps=20)
        >>> purified, _ = purifier(x)
        >>> purified.shape, purified.dtype
        ((4, 1, 8, 8), dtype('uint8'))
        >>> purifier.reconstruction_errors(x).shape
        (4,)
    """

    params = [*Purifier.params, "model", "steps", "restarts", "learning_rate", "optimizer", "momentum", "encode"]
    gradients = ("identity", "exact", "implicit")

    def __init__(
        self,
        model: Generator | str | PathLike[str],
        steps: int = 100,
        restarts: int = 1,
        clip_values: ClipValues = (0.0, 1.0),
        batch_size: int = 256,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        learning_rate: float = 0.1,
        optimizer: str = "adam",
        momentum: float = 0.7,
        encode: bool | None = None,
        gradient: str = "implicit",
        seed: int | None = None,
        device_type: str = "gpu",
    ) -> None:
        self.model, self.steps, self.restarts, self.encode = model, steps, restarts, encode
        self.learning_rate, self.optimizer, self.momentum = learning_rate, optimizer, momentum
        super().__init__(
            clip_values, batch_size, apply_fit, apply_predict, verbose,
            gradient=gradient, seed=seed, device_type=device_type,
        )  # fmt: skip

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether a search begins at random."""
        return self.restarts > bool(self.encode)

    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The closest images of the generator, clipped to [0, 1]."""
        closest, errors = self._project(x, generator)
        found = errors.isfinite()
        if not found.all():
            count = int((~found).sum())
            warnings.warn(
                f"the projection of {count} of {len(x)} images diverged; they are left unpurified. Lower learning_rate",
                stacklevel=2,
            )
        return torch.where(_per_image(found), closest.clamp(0, 1).to(x.dtype), x)

    def reconstruction_errors(self, x: np.ndarray) -> np.ndarray:
        """The root mean square distances (N,) of images to the generator's range, in units of the [0, 1] range.

        They serve as scores of anomaly: images that are unlike the training images are farther from the range.
        Infinite where the search diverged.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) in the range of ``clip_values``.

        Raises:
            ValueError: naming ``x``, as for purification.
        """
        images = Images(self.image_shape, self.clip_values, self.channels_first)
        tensor, seed = as_tensor(x), self._call_seed()
        images.check(tensor)

        def errors(positions: Tensor) -> Tensor:
            unit = images.to_unit(tensor[positions]).clamp(0, 1).to(self.model.device, torch.float32)
            return self._project(unit, BatchGenerator(seed, positions.tolist(), unit.device))[1].cpu()

        with torch.no_grad(), self._evaluating():
            found = map_batches(
                errors, torch.arange(len(tensor), device="cpu"), self.batch_size, verbose=self.verbose, what="project"
            )
        return (found / math.prod(self.model.image_shape)).sqrt().numpy()

    def _project(self, x: Tensor, generator: BatchGenerator) -> tuple[Tensor, Tensor]:
        """The closest images found, not clipped, and their sums of squared differences (N,); infinite for failures."""
        model: Generator = self.model
        differentiated = x.requires_grad and torch.is_grad_enabled()
        unrolled = differentiated and self.gradient == "exact"
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().to(model.device, model.dtype)
            target = x if unrolled else x.detach()
            repeated = target.repeat_interleave(self.restarts, 0)

            def objective(z: Tensor) -> Tensor:
                return (model(z) - repeated).square().sum()

            z = self._search(objective, self._starts(target, generator).flatten(0, 1), unrolled)
            with torch.no_grad():
                errors = (model(z) - repeated).square().flatten(1).sum(1).unflatten(0, (len(x), self.restarts))
                errors = torch.where(errors.isfinite(), errors, torch.inf)
            smallest, best = errors.min(1)
            z = z.unflatten(0, (len(x), self.restarts))[torch.arange(len(x), device=best.device), best]
            if differentiated and not unrolled:
                z = self._implicit(z, x)
            if differentiated:  # of a search that diverged derivatives are NaN, also after a gradient of zero
                x.register_hook(lambda gradient: torch.where(_per_image(smallest.isfinite()), gradient, 0.0))
            with torch.set_grad_enabled(differentiated):
                return model(z), smallest

    def _starts(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """Where the searches begin: latents (N, restarts, L)."""
        encoded = self.model.encode(x)[:, None] if self.encode else None
        drawn = generator.normal((self.restarts - bool(self.encode), self.model.latent_size)).to(x)
        return drawn if encoded is None else torch.cat((encoded, drawn), 1)

    def _search(self, objective: Callable[[Tensor], Tensor], z: Tensor, differentiable: bool) -> Tensor:
        """Descend from ``z`` (M, L); ``objective`` is a sum over rows. Autograd records all steps if asked to."""
        first, second = torch.zeros_like(z), torch.zeros_like(z)
        for step in range(self.steps):
            z = z if differentiable and z.requires_grad else z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(z), z, create_graph=differentiable)
            rate = self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            with torch.set_grad_enabled(differentiable):
                if self.optimizer == "momentum":
                    first = self.momentum * first + gradient
                    z = z - rate * first
                    continue
                first = torch.lerp(gradient, first, BETAS[0])
                second = torch.lerp(gradient.square(), second, BETAS[1])
                mean, square = (
                    moment / (1 - beta ** (step + 1)) for moment, beta in zip((first, second), BETAS, strict=True)
                )
                z = z - rate * mean / (square + ERRORS**2).sqrt()
        return z if differentiable else z.detach()

    def _implicit(self, z: Tensor, x: Tensor) -> Tensor:
        """``z`` with the derivative of a minimum of |G(z) - x|^2 with respect to ``x``.

        At a minimum g(z, x) = 0, so that dz/dx = -H^-1 dg/dx, H = dg/dz. Directions without effect do not move.
        """
        leaf = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((self.model(leaf) - x).square().sum(), leaf, create_graph=True)
        rows = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in gradient.unbind(1)]
        hessian = torch.stack(rows, 1).detach()
        usable = hessian.isfinite().all(-1).all(-1)[:, None, None]
        inverse = torch.linalg.pinv(torch.where(usable, hessian, 0.0), rtol=RANK, hermitian=True)
        return leaf.detach() - ((gradient - gradient.detach())[:, None] @ inverse)[:, 0]

    def _check_params(self) -> None:
        self.model = as_model(self.model, Generator, self.device, name="model")
        check_attributes(self, check_count, "steps", "restarts")
        self.learning_rate = check_number("learning_rate", self.learning_rate)
        self.momentum = check_number("momentum", self.momentum, 0.0, 1.0)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.encode is None:
            self.encode = self.model.encodes
        if not isinstance(self.encode, bool) or self.encode > self.model.encodes:
            raise ValueError(f"encode must be a bool, and False for a generator without encoder, got {self.encode!r}")
        super()._check_params()


def _per_image(mask: Tensor) -> Tensor:
    return mask[:, None, None, None]
