"""Anomaly scores: functions from an image to a number that is higher for images unlike clean ones."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from abc import ABC, abstractmethod
from os import PathLike
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import Preprocessor
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.classifier import ClassifierMixin
from PIL import Image
from torch import Tensor, nn

from art_pixeldefend.levels import TOP, UNIT, Images, to_levels
from art_pixeldefend.models.base import ImageModel, evaluation_mode
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.precision import full_float32
from art_pixeldefend.purifiers.base import GRADIENTS, BatchGenerator, Purifier, StraightThrough
from art_pixeldefend.purifiers.logits import differentiable_logits
from art_pixeldefend.validation import check_choice, check_count, check_number, check_seed

NEAR = 1e-3  # levels: values as near to a level as that are taken for it
CODECS = ("png", "zlib")
OUTPUTS = ("logits", "probabilities")


class Score(ABC):
    """Base class of anomaly scores: functions of images in [0, 1] that are higher for more anomalous images.

    A subclass implements :meth:`score` and names its constructor's arguments that determine its values, all kept as
    attributes, in ``params``.

    Attributes:
        unit: of the score's values.
        model: the image model it uses, or None. It sets the images' shape and device.
        stochastic: whether it draws random numbers.
        seed: of these. With an integer, a score is a function of the seed and the image's position in the input; None
            draws a new seed from torch's global generator at each call.

    Example:
        >>> class Contrast(Score):
        ...     unit = "pixel values"
        ...
        ...     def score(self, x, generator):
        ...         return x.amax((1, 2, 3)) - x.amin((1, 2, 3))
        >>> Contrast()(torch.tensor([0.0, 0.25, 1.0, 0.5]).view(2, 1, 1, 2)).tolist()
        [0.25, 0.5]
    """

    unit: str = ""
    params: tuple[str, ...] = ()
    model: Any = None
    stochastic: bool = False
    seed: int | None = 0

    @abstractmethod
    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """Score one batch.

        Args:
            x: images (N, C, H, W) in [0, 1], float32 or float64, on the model's device.
            generator: of all random numbers, with one stream for each image.

        Returns:
            (N,), differentiable with respect to ``x`` where the model is.
        """

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images; None for any shape."""
        return None if self.model is None else self.model.image_shape

    def __call__(self, x: Tensor, *, start: int = 0, seed: int | None = None) -> Tensor:
        """Score images.

        Args:
            x: images (N, C, H, W) in [0, 1], floating-point.
            start: position of the first image in the whole input, for inputs that are passed batch by batch.
            seed: of the random numbers, instead of the instance's.

        Returns:
            Scores (N,) on the device of ``x``, differentiable with respect to ``x`` where the model is.

        Raises:
            ValueError: naming ``x``: a wrong shape or dtype, NaN or infinity, or values far outside [0, 1].
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a floating-point tensor (N, C, H, W) in [0, 1], got {got}")
        if self.image_shape is not None and tuple(x.shape[1:]) != tuple(self.image_shape):
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must be of shape (N, {expected}), got {tuple(x.shape)}")
        Images(None, UNIT, channels_first=True).check(x)
        device = x.device if self.model is None else self.model.device
        unit = x.to(device, torch.promote_types(x.dtype, torch.float32))
        seed = self.seed if seed is None else seed
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu")) if self.stochastic else 0
        generator = BatchGenerator(seed, range(start, start + len(x)), unit.device, unit.dtype)
        with full_float32():
            return self.score(unit, generator).to(x.device)

    def fingerprint(self) -> str:
        """A SHA-256 of the class, its parameters and the weights of its models: equal for equal functions."""
        parts = [type(self).__qualname__, *(f"{name}={_identity(getattr(self, name))}" for name in self.params)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def models(self) -> list[ImageModel]:
        """The image models that it uses, those of its purifier included."""
        values = (getattr(self, name) for name in self.params)
        used = (value.model if isinstance(value, Purifier) else value for value in values)
        return [model for model in used if isinstance(model, ImageModel)]

    def __repr__(self) -> str:
        shown = [
            f"{name}={value!r}"
            for name, value in ((name, getattr(self, name)) for name in self.params)
            if not isinstance(value, (nn.Module, ClassifierMixin))
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


# Likelihoods


class Likelihood(Score):
    """The negative log-likelihood of images under a density model, in bits per dimension.

    It is exact for images of 8-bit levels. Between levels it is a relaxation: the logistic mixtures' mass between
    z - 1/2 and z + 1/2 at any real z, given real values of the earlier sub-pixels. It equals the likelihood at levels
    and has gradients with respect to the image. Its values for other images are not likelihoods: round the result of
    an attack to levels before it is judged.

    Constant images and other simple ones are likely, and get low scores.

    Args:
        model: a :class:`PixelCNNpp`, the name of a bundled one, or the path of one.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import datasets
        >>> x = torch.from_numpy(datasets.load("digits").x_test[:3]).float() / 255
        >>> score = Likelihood("digits")
        >>> bool((score(torch.rand(3, 1, 8, 8)) > score(x)).all())
        True
    """

    unit = "bits/dim"
    params = ("model",)

    def __init__(self, model: PixelCNNpp | str | PathLike[str]) -> None:
        self.model: PixelCNNpp = as_model(model, PixelCNNpp, name="model")

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """-log p(x) in bits per dimension."""
        return self.nats(x) / (math.prod(self.model.image_shape) * math.log(2))

    def nats(self, x: Tensor) -> Tensor:
        """-log p(x) in nats, (N,), float64, of images (N, C, H, W) in [0, 1] on the model's device."""
        scaled = x * TOP
        levels = scaled.detach().round().clamp(0, TOP)
        near = (scaled.detach() - levels).abs() < NEAR
        if not (x.requires_grad and torch.is_grad_enabled()):
            if bool(near.all()):
                return -self.model.log_prob(levels.to(torch.uint8))
            with torch.no_grad():
                return self._relaxed(scaled, levels, near)
        return self._relaxed(scaled, levels, near)

    def _relaxed(self, scaled: Tensor, levels: Tensor, near: Tensor) -> Tensor:
        """-log p in nats of real-valued levels; those near a level are moved onto it, with unchanged gradients."""
        exact = torch.where(near, scaled + (levels - scaled).detach(), scaled)
        with self.model.evaluating():
            log_probs = self.model.sub_pixel_log_probs(exact.to(torch.promote_types(self.model.dtype, torch.float32)))
        return -log_probs.double().sum((1, 2, 3))


class LikelihoodRatio(Score):
    """How much likelier images are under a background model than under the model, in bits per dimension.

        (log p_background(x) - log p(x)) / (C H W log 2)

    The background model, trained on images with random sub-pixels by
    :class:`~art_pixeldefend.models.pixelcnnpp.background.BackgroundLoss`, accounts for what any image has in common
    (Ren et al. 2019, arXiv:1906.02845). Values between levels are those of :class:`Likelihood`.

    Args:
        model: a :class:`PixelCNNpp`, the name of a bundled one, or the path of one.
        background: the same, for images of the same shape.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> score = LikelihoodRatio("digits", "digits")
        >>> score(torch.zeros(2, 1, 8, 8)).tolist()
        [0.0, 0.0]
    """

    unit = "bits/dim"
    params = ("model", "background")

    def __init__(self, model: PixelCNNpp | str | PathLike[str], background: PixelCNNpp | str | PathLike[str]) -> None:
        self._likelihood = Likelihood(model)
        self.model = self._likelihood.model
        self.background = as_model(background, PixelCNNpp, self.model.device, name="background")
        self._background = Likelihood(self.background)
        if self.background.image_shape != self.model.image_shape:
            raise ValueError(
                f"background must be a model of images {self.model.image_shape}, got {self.background.image_shape}"
            )

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The difference of the two scores in bits per dimension."""
        background = self._background.score(x.to(self.background.device), generator)
        return self._likelihood.score(x, generator) - background.to(x.device)


class ComplexityCorrectedLikelihood(Score):
    """The negative log-likelihood minus the length of the compressed image, in bits per dimension.

    Simple images are likely whatever they show; the length of a lossless code corrects for it (Serra et al. 2020,
    arXiv:1909.11480). Images are rounded to levels for the codec. The code's length is piecewise constant: gradients
    are those of :class:`Likelihood`.

    Args:
        model: a :class:`PixelCNNpp`, the name of a bundled one, or the path of one.
        codec: ``"png"`` or ``"zlib"``, at the highest compression level; headers and checksums do not count.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> x = torch.cat([torch.zeros(1, 1, 8, 8), torch.rand(1, 1, 8, 8)])  # a constant image and noise
        >>> plain, corrected = Likelihood("digits"), ComplexityCorrectedLikelihood("digits")
        >>> (plain(x) - corrected(x)).argmax().item()  # noise compresses worse
        1
    """

    unit = "bits/dim"
    params = ("model", "codec")

    def __init__(self, model: PixelCNNpp | str | PathLike[str], codec: str = "png") -> None:
        self._likelihood = Likelihood(model)
        self.model = self._likelihood.model
        check_choice("codec", codec, CODECS)
        self.codec = codec

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """-log p(x) minus the code's length, in bits per dimension."""
        images = to_levels(x.detach()).cpu().numpy()
        bits = [8 * compressed_bytes(image, self.codec) / image.size for image in images]
        return self._likelihood.score(x, generator) - torch.tensor(bits, dtype=torch.float64, device=x.device)


def compressed_bytes(image: np.ndarray, codec: str = "png") -> int:
    """The number of bytes of a losslessly compressed image, without headers and checksums.

    Args:
        image: levels (C, H, W), uint8. Channels other than 1 or 3 are compressed below each other.
        codec: ``"png"``: PNG's filters and deflate; ``"zlib"``: deflate of the bytes in the order of the array.

    Example:
        >>> compressed_bytes(np.zeros((1, 28, 28), np.uint8)) < 20
        True
    """
    if codec == "zlib":
        compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)  # negative: no header, no checksum
        return len(compressor.compress(image.tobytes()) + compressor.flush())
    channels, height, width = image.shape
    rows = np.moveaxis(image, 0, -1) if channels == 3 else image.reshape(channels * height, width)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rows)).save(buffer, "PNG", compress_level=9)
    data, position, length = buffer.getvalue(), 8, 0
    while position < len(data):  # chunks: length, name, content, checksum
        size, name = struct.unpack_from(">I4s", data, position)
        length += size if name == b"IDAT" else 0
        position += size + 12
    return length - 6  # zlib's header of 2 bytes and checksum of 4


# Scores of a denoiser


class ScoreNorm(Score):
    """The Euclidean norm of the score at a noise level, times the noise level; no unit.

    It is the distance by which the denoiser moves an image, in standard deviations of the noise, and what ADP (Yoon,
    Hwang and Lee 2021, arXiv:2106.06041, appendix F) compares with a threshold. It detects noise, harmless noise
    included; constant images have low norms.

    Args:
        model: a :class:`ScoreModel`, the name of a bundled one, or the path of one.
        sigma: the noise level, in [0, 1] pixel values.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import datasets
        >>> x = torch.from_numpy(datasets.load("digits").x_test[:3]).float() / 255
        >>> score, noisy = ScoreNorm("digits-score"), (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
        >>> bool((score(noisy) > score(x)).all())
        True
    """

    unit = "standard deviations"
    params = ("model", "sigma")

    def __init__(self, model: ScoreModel | str | PathLike[str], sigma: float = 0.02) -> None:
        self.model: ScoreModel = as_model(model, ScoreModel, name="model")
        self.sigma = _check_sigma(sigma, self.model)

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """sigma |s(x, sigma)|."""
        return self.sigma * self.model.score(x, self.sigma).flatten(1).norm(dim=1)


class DenoisingError(Score):
    """The root mean square error of denoising the image after noise was added to it, in [0, 1] pixel values.

    Images that the denoiser was not trained on are reconstructed less well.

    Args:
        model: a :class:`ScoreModel`, the name of a bundled one, or the path of one.
        sigma: standard deviation of the noise, in [0, 1] pixel values.
        runs: draws of the noise; the square error is averaged over them.
        seed: as in :class:`Score`.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> score = DenoisingError("digits-score", sigma=0.1, runs=4)
        >>> score(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    unit = "pixel values"
    params = ("model", "sigma", "runs")
    stochastic = True

    def __init__(
        self, model: ScoreModel | str | PathLike[str], sigma: float = 0.1, runs: int = 1, *, seed: int | None = 0
    ) -> None:
        self.model: ScoreModel = as_model(model, ScoreModel, name="model")
        self.sigma = _check_sigma(sigma, self.model)
        self.runs, self.seed = check_count("runs", runs), check_seed("seed", seed)

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The root of the mean over draws and sub-pixels of (denoise(x + sigma n) - x)^2."""
        errors = [
            self.model.denoise(x + self.sigma * generator.normal(x.shape[1:]), self.sigma) - x for _ in range(self.runs)
        ]
        return _root_mean_square(errors)


# Scores of a purifier


class PurifierChange(Score):
    """The root mean square of a purifier's change of the image, in [0, 1] pixel values.

    For a purifier with ``gradient="identity"`` the purified image is held constant in the backward pass; otherwise the
    gradient would be zero.

    Args:
        purifier: a :class:`~art_pixeldefend.purifiers.Purifier`; its ``clip_values`` and ``seed`` have no effect.
        runs: draws of a stochastic purifier; the square change is averaged over them.
        seed: as in :class:`Score`.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import PixelDefend, datasets
        >>> x = torch.from_numpy(datasets.load("digits").x_test[:2]).float() / 255
        >>> score = PurifierChange(PixelDefend(eps=16, pixel_cnn="digits"))
        >>> bool((score(x) <= 16.001 / 255).all())
        True
    """

    unit = "pixel values"
    params: tuple[str, ...] = ("purifier", "runs")

    def __init__(self, purifier: Purifier, runs: int = 1, *, seed: int | None = 0) -> None:
        self.purifier = _check_purifier(purifier)
        self.runs, self.seed = check_count("runs", runs), check_seed("seed", seed)

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The purifier's image model."""
        return self.purifier.model

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether the purifier is."""
        return self.purifier.stochastic

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images; None for any shape."""
        return self.purifier.image_shape

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The root of the mean over draws and sub-pixels of (purify(x) - x)^2."""
        changes = []
        for _ in range(self.runs if self.stochastic else 1):
            purified = _purified(self.purifier, x, generator)
            purified = purified.detach() if self.purifier.gradient == "identity" else purified
            changes.append(purified - x)
        return _root_mean_square(changes)


class PredictionChange(PurifierChange):
    """The change of a classifier's prediction when the image is purified, as an L1 distance from 0 to 2.

    The distance between the class probabilities of the image and of its purified version. Unlike likelihoods it tells
    attacks from harmless noise, and finds small perturbations of minimum norm.

    Args:
        classifier: a module from images (N, C, H, W) in [0, 1] to (N, classes), or an ART classifier of any framework,
            whose ``clip_values`` and preprocessing apply. Classifiers other than modules and ``PyTorchClassifier`` give
            no gradients. A module is evaluated in evaluation mode.
        purifier: a :class:`~art_pixeldefend.purifiers.Purifier`; its ``clip_values`` and ``seed`` have no effect.
        runs: draws of a stochastic purifier; the distance is averaged over them.
        output: what the classifier returns: ``"logits"`` or ``"probabilities"``.
        seed: as in :class:`Score`.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import ScorePurifier
        >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> score = PredictionChange(classifier, ScorePurifier("digits-score", sigma=0.1), runs=2)
        >>> score(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3])
    """

    unit = "L1 distance"
    params = ("classifier", "purifier", "runs", "output")

    def __init__(
        self, classifier: Any, purifier: Purifier, runs: int = 1, *, output: str = "logits", seed: int | None = 0
    ) -> None:
        if not isinstance(classifier, (nn.Module, ClassifierMixin)):
            raise ValueError(
                f"classifier must be a torch.nn.Module or an ART classifier, got {type(classifier).__name__}"
            )
        check_choice("output", output, OUTPUTS)
        self.classifier, self.output = classifier, output
        super().__init__(purifier, runs, seed=seed)

    def score(self, x: Tensor, generator: BatchGenerator) -> Tensor:
        """The mean over draws of |p(x) - p(purify(x))|_1, p being the class probabilities."""
        before = self._probabilities(x)
        changes = [
            (self._probabilities(_purified(self.purifier, x, generator)) - before).abs().sum(1)
            for _ in range(self.runs if self.stochastic else 1)
        ]
        return torch.stack(changes).mean(0)

    def _probabilities(self, x: Tensor) -> Tensor:
        """The class probabilities (N, classes) of images, on their device."""
        outputs = outputs_of(self.classifier, x).to(x.device)
        if outputs.ndim != 2:
            raise ValueError(f"classifier must return outputs (N, classes), got shape {tuple(outputs.shape)}")
        return outputs.softmax(1) if self.output == "logits" else outputs


def outputs_of(classifier: Any, x: Tensor) -> Tensor:
    """The outputs (N, classes) of a module or an ART classifier for images in [0, 1], differentiable if it is torch's.

    Raises:
        ValueError: naming ``classifier``, if gradients are needed that it cannot give.
    """
    if isinstance(classifier, nn.Module):
        with evaluation_mode(classifier):
            weights = next(classifier.parameters(), x)
            return classifier(x.to(weights.device, weights.dtype)).to(x.dtype)
    low, high = UNIT if classifier.clip_values is None else classifier.clip_values
    channels_first = getattr(classifier, "channels_first", True)
    if isinstance(classifier, PyTorchClassifier):
        low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high))
        images = x if channels_first else x.movedim(1, -1)
        with evaluation_mode(classifier.model):
            return differentiable_logits(classifier, (images * (high - low) + low).to(classifier.device))
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"classifier must be a module or a PyTorchClassifier for gradients, got {type(classifier)}")
    array = x.detach().cpu().numpy()
    array = (array if channels_first else np.moveaxis(array, 1, -1)) * (high - low) + low
    return torch.as_tensor(classifier.predict(array.astype(np.float32)), dtype=x.dtype)


# Helpers


def _purified(purifier: Purifier, x: Tensor, generator: BatchGenerator) -> Tensor:
    """Purify a batch in [0, 1] with the given random numbers; gradients are as ``purifier.gradient`` says."""
    x = x.to(torch.promote_types(x.dtype, purifier.precision))
    if purifier.clips_input:
        x = StraightThrough.apply(x, lambda values: values.clamp(0, 1))
    with purifier._evaluating():
        if purifier.gradient in GRADIENTS[1:]:
            return purifier.purify(x, generator)
        purified = StraightThrough.apply(x, lambda values: purifier.purify(values, generator))
        if callable(purifier.gradient) and x.requires_grad and torch.is_grad_enabled():
            surrogate = purifier.gradient(x)
            return purified.detach() + (surrogate - surrogate.detach())
        return purified


def _root_mean_square(differences: list[Tensor]) -> Tensor:
    """The root mean square (N,) of differences of images in several draws; its gradient is 0 where all are 0."""
    values = torch.stack(differences, dim=1).flatten(1)
    return values.norm(dim=1) / math.sqrt(values.shape[1])


def _check_sigma(sigma: Any, model: ScoreModel) -> float:
    sigma = check_number("sigma", sigma, 0.0, model.sigma_range[1])
    if not sigma:
        raise ValueError("sigma must be above 0, got 0")
    return sigma


def _check_purifier(purifier: Any) -> Purifier:
    if not isinstance(purifier, Purifier):
        raise ValueError(f"purifier must be a Purifier, got {type(purifier).__name__}")
    return purifier


def _identity(value: Any) -> str:
    """A text that is equal for equal values: the fingerprints of models, the settings of purifiers."""
    if isinstance(value, ImageModel):
        return value.fingerprint()
    if isinstance(value, nn.Module):
        digest = hashlib.sha256(repr(value).encode())
        for name, tensor in sorted(value.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    if isinstance(value, Preprocessor):
        common = Purifier.params if isinstance(value, Purifier) else ()  # ranges, batches and seeds change nothing
        settings = [f"{name}={_identity(getattr(value, name))}" for name in value.params if name not in common]
        return f"{type(value).__qualname__}({', '.join(sorted(settings))})"
    if isinstance(value, ClassifierMixin):
        model = _identity(value.model) if isinstance(value, PyTorchClassifier) else ""
        operations = [_identity(operation) for operation in value.preprocessing_operations]
        return f"{type(value).__qualname__}({model}, {value.clip_values}, {operations})"
    return repr(value)
