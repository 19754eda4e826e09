"""Purification with a score model: adding noise to images and removing it, and the perturbation with it."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from art_pixeldefend.batches import map_batches
from art_pixeldefend.levels import ClipValues, Images, as_tensor
from art_pixeldefend.models.score import ScoreModel, noise_levels, reverse_diffusion
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers.adaptive_updates import AdaptiveStep, adaptive_updates
from art_pixeldefend.purifiers.base import BatchGenerator, Purifier
from art_pixeldefend.validation import check_attributes, check_count, check_number


class ScoreDenoiser(Purifier):
    """Remove Gaussian noise of a known level from images, in one pass of a score model (Tweedie's formula).

    This is the denoiser of denoised smoothing (Salman et al. 2020, arXiv:2003.01908; Carlini et al. 2022,
    arXiv:2206.10550): it turns a classifier of clean images into one that randomized smoothing can certify. It adds no
    noise itself, takes images with values outside ``clip_values`` as they are, and clips its result.

    Args:
        model: a :class:`ScoreModel`, the name of a bundled one, or the path of one.
        sigma: standard deviation of the noise in the images, in the range from 0 to 1 that ``clip_values`` stand for:
            the ``scale`` of ART's ``PyTorchRandomizedSmoothing`` divided by (maximum - minimum).
        clip_values, batch_size, apply_fit, apply_predict, verbose, gradient, device_type: as in
            :class:`~art_pixeldefend.purifiers.base.Purifier`.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import numpy as np
        >>> from art_pixeldefend import ScoreDenoiser, datasets
        >>> x = datasets.load("digits").x_test[:50].astype(np.float32) / 255
        >>> noisy = x + np.random.default_rng(0).normal(0, 0.25, x.shape).astype(np.float32)
        >>> denoised, _ = ScoreDenoiser("digits-score", sigma=0.25)(noisy)
        >>> bool(np.abs(denoised - x).mean() < 0.5 * np.abs(noisy - x).mean())
        True
    """

    params = [*Purifier.params, "model", "sigma"]
    gradients = ("identity", "exact")
    clips_input = False

    def __init__(
        self,
        model: ScoreModel | str | PathLike[str],
        sigma: float = 0.25,
        clip_values: ClipValues = (0.0, 1.0),
        batch_size: int = 256,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        gradient: str = "exact",
        device_type: str = "gpu",
    ) -> None:
        self.model, self.sigma = model, sigma
        super().__init__(
            clip_values, batch_size, apply_fit, apply_predict, verbose, gradient=gradient, device_type=device_type
        )

    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The denoised images, clipped to [0, 1]."""
        return self.model.denoise(x, self.sigma).clamp(0, 1)

    def _check_params(self) -> None:
        self.model = as_model(self.model, ScoreModel, self.device, name="model")
        self.sigma = check_number("sigma", self.sigma, 0.0, self.model.sigma_range[1])
        super()._check_params()


class ScorePurifier(Purifier):
    """Add Gaussian noise to images and remove it with a score model.

    The noise drowns small perturbations; the model, trained on clean images, removes both. All three variants start
    from x + ``sigma`` n, n ~ N(0, I):

    - ``steps=1``: one pass of the denoiser, the posterior mean.
    - ``steps`` > 1: a short reverse diffusion as in DiffPure (Nie et al. 2022, arXiv:2205.07460), ancestral for
      ``eta=1``, deterministic for ``eta=0``. It samples one image where a single pass averages over all likely ones.
    - ``adaptive=AdaptiveStep()``, ``steps=10``: adversarial purification with score-based models (ADP: Yoon, Hwang and
      Lee 2021, arXiv:2106.06041), which moves along the score at ``sigma`` with a step size per image; see
      :func:`~art_pixeldefend.purifiers.adaptive_updates.adaptive_updates`. It takes two passes per step.

    With a ``threshold``, only images with a larger score norm are purified (ADP, appendix F). This keeps the accuracy
    on clean images, but an attack that takes the norm into account can stay below the threshold.

    Noisy images are not clipped, unlike in ADP's code; results are.

    Args:
        model: a :class:`ScoreModel`, the name of a bundled one, or the path of one.
        sigma: standard deviation of the noise, in the range from 0 to 1 that ``clip_values`` stand for. Larger values
            remove larger perturbations, and more of the image.
        steps: passes of the denoiser, or updates of ADP.
        eta: share of fresh noise in each step of the reverse diffusion, 0 to 1.
        adaptive: the step sizes of ADP; None for the reverse diffusion.
        threshold: of :meth:`score_norms`, above which images are purified; None purifies all.
        detection_sigma: the noise level at which the norm is computed.
        spared_sigma: the noise level for images up to the threshold; 0 leaves them as they are.
        clip_values, batch_size, apply_fit, apply_predict, verbose, seed, device_type: as in
            :class:`~art_pixeldefend.purifiers.base.Purifier`.
        gradient: ``"exact"`` differentiates every step, with the draws of the forward pass; ``"identity"`` (BPDA)
            overestimates the robustness of this purifier.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> import numpy as np
        >>> from art_pixeldefend import ScorePurifier, datasets
        >>> x = datasets.load("digits").x_test[:5].astype(np.float32) / 255
        >>> purified, _ = ScorePurifier("digits-score", sigma=0.25, seed=0)(x)
        >>> purified.shape, bool((purified >= 0).all() and (purified <= 1).all())
        ((5, 1, 8, 8), True)
    """

    params = [
        *Purifier.params, "model", "sigma", "steps", "eta", "adaptive", "threshold", "detection_sigma", "spared_sigma",
    ]  # fmt: skip
    stochastic = True
    gradients = ("identity", "exact")

    def __init__(
        self,
        model: ScoreModel | str | PathLike[str],
        sigma: float = 0.25,
        steps: int = 1,
        clip_values: ClipValues = (0.0, 1.0),
        batch_size: int = 256,
        apply_fit: bool = False,
        apply_predict: bool = True,
        verbose: bool = False,
        *,
        eta: float = 1.0,
        adaptive: AdaptiveStep | None = None,
        threshold: float | None = None,
        detection_sigma: float = 0.02,
        spared_sigma: float = 0.0,
        gradient: str = "exact",
        seed: int | None = None,
        device_type: str = "gpu",
    ) -> None:
        self.model, self.sigma, self.steps, self.eta, self.adaptive = model, sigma, steps, eta, adaptive
        self.threshold, self.detection_sigma, self.spared_sigma = threshold, detection_sigma, spared_sigma
        super().__init__(
            clip_values, batch_size, apply_fit, apply_predict, verbose,
            gradient=gradient, seed=seed, device_type=device_type,
        )  # fmt: skip

    def purify(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The purified images, clipped to [0, 1]."""
        if self.threshold is None:
            return self._purify(x, self.sigma, generator).clamp(0, 1)
        perturbed = self._score_norms(x) > self.threshold
        for chosen, sigma in ((perturbed, self.sigma), (~perturbed, self.spared_sigma)):
            index = chosen.nonzero().squeeze(1)
            if len(index):
                x = x.index_copy(0, index, self._purify(x[index], sigma, generator.subset(index)))
        return x.clamp(0, 1)

    def score_norms(self, x: np.ndarray) -> np.ndarray:
        """The norms (N,) of the scores of images at ``detection_sigma``, times ``detection_sigma``.

        To spare 95% of clean images take ``threshold=np.quantile(purifier.score_norms(x), 0.95)`` of clean images
        ``x`` (N, C, H, W) or (N, H, W, C) that the model was not trained on.

        Raises:
            ValueError: naming ``x``, as for purification.
        """
        images = Images(self.image_shape, self.clip_values, self.channels_first)
        tensor = as_tensor(x)
        images.check(tensor)

        def norms(some: Tensor) -> Tensor:
            return self._score_norms(images.to_unit(some).clamp(0, 1).float()).cpu()

        return map_batches(norms, tensor, self.batch_size, verbose=self.verbose, what="score").numpy()

    def _purify(self, x: Tensor, sigma: float, generator: BatchGenerator) -> Tensor:
        """Noise added and removed; not clipped."""
        if not sigma:
            return x

        def noise() -> Tensor:
            return generator.normal(x.shape[1:])

        x = x + sigma * noise()
        if self.adaptive is not None:
            return adaptive_updates(x, lambda x: sigma * self.model.score(x, sigma), self.steps, self.adaptive)[0]
        return reverse_diffusion(self._denoise, x, noise_levels(sigma, self.steps), self.eta, noise)

    def _denoise(self, x: Tensor, sigma: float) -> Tensor:
        """The denoised images, whose activations are computed again in the backward pass if there are more steps."""
        if self.steps == 1:
            return self.model.denoise(x, sigma)
        return checkpoint(self.model.denoise, x, sigma, use_reentrant=False, preserve_rng_state=False)

    @torch.no_grad()
    def _score_norms(self, x: Tensor) -> Tensor:
        return self.detection_sigma * self.model.score(x, self.detection_sigma).flatten(1).norm(dim=1)

    def _check_params(self) -> None:
        self.model = as_model(self.model, ScoreModel, self.device, name="model")
        most = self.model.sigma_range[1]
        check_attributes(self, check_number, "sigma", "spared_sigma", high=most)
        self.detection_sigma = check_number("detection_sigma", self.detection_sigma, 1e-6, most)
        self.steps = check_count("steps", self.steps)
        self.eta = check_number("eta", self.eta, 0.0, 1.0)
        if self.threshold is not None:
            self.threshold = check_number("threshold", self.threshold)
        if not isinstance(self.adaptive, AdaptiveStep | None):
            raise ValueError(f"adaptive must be an AdaptiveStep or None, got {self.adaptive!r}")
        super()._check_params()
