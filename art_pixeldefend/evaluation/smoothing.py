"""Certified robustness by randomized smoothing (Cohen, Rosenfeld and Kolter 2019, arXiv:1902.02918).

The smoothed classifier g(x) is the class that a base classifier f returns most often for x + n, n ~ N(0, sigma^2 I). If
f returns class c with probability at least p > 1/2, then g returns c within the L2 ball of radius sigma Phi^-1(p).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from scipy.stats import beta, norm
from torch import Tensor, nn
from tqdm import tqdm

from art_pixeldefend.evaluation.preprocessors import description
from art_pixeldefend.evaluation.table import markdown_table
from art_pixeldefend.files import check_file, write_atomically
from art_pixeldefend.levels import as_tensor
from art_pixeldefend.models.base import evaluation_mode
from art_pixeldefend.processes import process_group
from art_pixeldefend.purifiers import PurifiedModel, Purifier
from art_pixeldefend.purifiers.base import BatchGenerator
from art_pixeldefend.validation import check_count, check_number

ABSTAIN = -1
ROUND = 8  # images of each process between two writes of the results
Classifier: TypeAlias = PyTorchClassifier | Callable[[Tensor], Tensor]  # ART's, or a function of images to logits


@dataclass(frozen=True)
class Certificates:
    """Certified predictions of a smoothed classifier.

    Each certificate, that the smoothed classifier returns :attr:`predictions` everywhere within :attr:`radii`, is
    wrong with probability at most ``alpha``.

    Args:
        selected: the class (N,) that was most frequent in the selection sample.
        counts: how many draws (N,) of the estimation sample had that class.
        n: draws of the estimation sample.
        sigma: standard deviation of the noise.
        alpha: probability of a wrong certificate.
    """

    selected: np.ndarray
    counts: np.ndarray
    n: int
    sigma: float
    alpha: float

    @property
    def lower_bounds(self) -> np.ndarray:
        """One-sided Clopper-Pearson bounds (N,) of the probability of the selected class, at confidence 1 - alpha."""
        return np.where(self.counts, beta.ppf(self.alpha, np.maximum(self.counts, 1), self.n - self.counts + 1), 0.0)

    @property
    def predictions(self) -> np.ndarray:
        """The certified classes (N,); ``ABSTAIN`` where the lower bound does not exceed 1/2."""
        return np.where(self.lower_bounds > 0.5, self.selected, ABSTAIN)

    @property
    def radii(self) -> np.ndarray:
        """The certified L2 radii (N,) in the units of the images; 0 where the classifier abstains."""
        return np.where(self.lower_bounds > 0.5, self.sigma * norm.ppf(self.lower_bounds), 0.0)

    @property
    def largest_radius(self) -> float:
        """The radius if all ``n`` draws agree: none can be larger."""
        return float(self.sigma * norm.ppf(self.alpha ** (1 / self.n)))

    def radii_of(self, y: np.ndarray) -> np.ndarray:
        """The radii (N,) within which images certainly get their class ``y`` (N,); -inf where that is not certain."""
        return np.where(self.predictions == y, self.radii, -np.inf)

    def accuracy(self, y: np.ndarray, radius: float = 0.0) -> float:
        """The fraction of images that certainly get their class ``y`` (N,) everywhere within ``radius``."""
        return float((self.radii_of(y) >= radius).mean())


def certify_smoothed(
    classifier: Classifier,
    x: np.ndarray | Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 500,
    seed: int = 0,
    file: str | PathLike[str] | None = None,
    name: str = "",
    overwrite: bool = False,
    verbose: bool = False,
) -> Certificates:
    """Certify the predictions of a smoothed classifier (CERTIFY of Cohen et al.).

    To certify a classifier of clean images, put a denoiser in front of it: as a preprocessing defence of an ART
    classifier, ``preprocessing_defences=[ScoreDenoiser("fashion-mnist-score", sigma)]``, or in a module,
    ``PurifiedModel(model, ScoreDenoiser("fashion-mnist-score", sigma))``.

    Under ``torchrun`` every process calls this with the same arguments and certifies its share of the images.

    Args:
        classifier: an ART classifier, or a module or function from images to logits (N, classes). It is evaluated in
            evaluation mode. If it draws random numbers, they must be new ones for every image that it is given: the
            certificate is about independent draws, so stochastic purifiers with a ``seed`` are refused.
        x: images (N, C, H, W), or of the shape that the classifier takes, of any value range.
        sigma: standard deviation of the noise, in the units of ``x``.
        n0: draws of the selection sample, by which the class is chosen.
        n: draws of the estimation sample, which is independent of it; the largest possible radius grows with it.
        alpha: largest probability that a certificate is wrong.
        batch_size: most noisy images in memory at a time.
        seed: of the noise, which is a function of seed and position of the image.
        file: a JSON file to store results in, and to resume from: images with a result in it are skipped.
        name: what the file calls the classifier; needed with ``file``. A file is resumed only for the same name,
            weights, arguments, and representations of modules and preprocessors. What else the classifier depends on
            is not compared.
        overwrite: replace ``file`` if it exists, whatever it holds, instead of resuming.
        verbose: show a progress bar.

    Raises:
        ValueError: naming the argument that is not as described; or ``file``, if it holds anything but results of these
            arguments and is not to be overwritten; if the classifier returns NaN.

    Example:
        >>> import numpy as np
        >>> from art_pixeldefend.evaluation.smoothing import certify_smoothed
        >>> x = np.array([[0.0], [0.5], [0.9]])
        >>> right_of_the_middle = lambda x: torch.cat([0.5 - x, x - 0.5], dim=1)
        >>> certificates = certify_smoothed(right_of_the_middle, x, sigma=0.25, n=10_000)
        >>> certificates.predictions.tolist(), certificates.radii.round(1).tolist()
        ([0, -1, 1], [0.5, 0.0, 0.4])
    """
    images = as_tensor(x.cpu().numpy() if isinstance(x, Tensor) else x).float()
    settings: dict[str, Any] = {
        "sigma": check_number("sigma", sigma, 1e-12), "n0": check_count("n0", n0), "n": check_count("n", n),
        "alpha": check_number("alpha", alpha, 1e-12, 0.5), "seed": check_count("seed", seed, 0),
        "name": name, "images": hashed([images]), "classifier": fingerprint(classifier),
    }  # fmt: skip
    batch_size = check_count("batch_size", batch_size)
    if file is not None and not name:
        raise ValueError("name must say which classifier the results in file belong to")
    for purifier in _purifiers(classifier):
        if purifier.stochastic and purifier.seed is not None:
            raise ValueError(f"classifier must draw new random numbers at each call, but {purifier} has a seed")
    group, logits = process_group(), _logits(classifier)
    results = _Results(file, settings, len(images), overwrite)
    with tqdm(
        total=len(images), initial=len(results.found), unit="image", disable=not verbose or group.rank > 0
    ) as bar:
        while missing := results.missing[: ROUND * group.world_size]:
            mine = group.shard(missing)
            counted = _sample(logits, images[mine], mine, settings, batch_size) if mine else []
            for share in group.gather(dict(zip(mine, counted, strict=True))):
                results.found |= share
            if group.rank == 0:
                results.write()
            bar.update(len(missing))
    selected, counts = np.array([results.found[i] for i in range(len(images))], dtype=np.int64).reshape(-1, 2).T
    return Certificates(selected, counts, settings["n"], settings["sigma"], settings["alpha"])


def _sample(
    logits: Callable[[Tensor], Tensor],
    x: Tensor,
    positions: Sequence[int],
    settings: Mapping[str, Any],
    batch_size: int,
) -> list[tuple[int, int]]:
    """(selected class, its count in the estimation sample) of images (N, ...) at ``positions`` of the whole input."""
    n0, draws = settings["n0"], settings["n0"] + settings["n"]
    some = max(1, batch_size // draws)  # images in one batch
    results = []
    for at in range(0, len(x), some):
        clean = x[at : at + some]
        noise = BatchGenerator(settings["seed"], positions[at : at + some])
        labels: list[Tensor] = []
        for start in range(0, draws, batch_size):
            count = min(batch_size, draws - start)
            noisy = clean[:, None] + settings["sigma"] * noise.normal((count, *x.shape[1:]))
            outputs = logits(noisy.flatten(0, 1))
            if outputs.isnan().any():
                raise ValueError("classifier returned NaN for noisy images")
            labels.append(outputs.argmax(1).reshape(-1, count).cpu())
        for of_image in torch.cat(labels, dim=1):
            selected = int(of_image[:n0].bincount().argmax())
            results.append((selected, int((of_image[n0:] == selected).sum())))
    return results


class _Results:
    """Results by position of the image, and the file that stores them."""

    def __init__(
        self, file: str | PathLike[str] | None, settings: Mapping[str, Any], count: int, overwrite: bool
    ) -> None:
        self.file, self.settings, self.count = None if file is None else Path(file), dict(settings), count
        self.found: dict[int, tuple[int, int]] = {}
        if self.file is None:
            return
        check_file(self.file, overwrite=True)  # :meth:`_read` refuses what cannot be resumed
        if self.file.is_file() and not overwrite:
            self._read(self.file)

    def _read(self, file: Path) -> None:
        try:
            content = json.loads(file.read_text())
            settings = content["settings"]
            self.found = {int(i): (int(selected), int(count)) for i, (selected, count) in content["images"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"file {str(file)!r} does not hold certificates: {error}") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(f"file {str(file)!r} is of another {name}: {settings.get(name)}, not {value}")

    @property
    def missing(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.found]

    def write(self) -> None:
        if self.file is not None:
            images = {str(i): self.found[i] for i in sorted(self.found)}
            write_atomically(self.file, json.dumps({"settings": self.settings, "images": images}) + "\n")


def _logits(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """A function of images on the CPU to logits on any device."""
    if isinstance(classifier, PyTorchClassifier):
        # The base classifier's method: a smoothed classifier of ART's has one of its own.
        return lambda x: torch.from_numpy(PyTorchClassifier.predict(classifier, x.numpy(), batch_size=len(x)))
    if not callable(classifier):
        raise ValueError(
            f"classifier must be an ART classifier, a module or a function, got {type(classifier).__name__}"
        )
    if not isinstance(classifier, nn.Module):
        return torch.no_grad()(classifier)
    device = next((p.device for p in classifier.parameters()), None)

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        with evaluation_mode(classifier):
            return classifier(x.to(device or x.device))

    return evaluate


def _purifiers(classifier: Any) -> list[Purifier]:
    """The purifiers in front of a classifier and inside its modules."""
    module = classifier.model if isinstance(classifier, PyTorchClassifier) else classifier
    inside = (
        [part.purifier for part in module.modules() if isinstance(part, PurifiedModel)]
        if isinstance(module, nn.Module)
        else []
    )
    before = getattr(classifier, "preprocessing_defences", None) or []
    return inside + [defence for defence in before if isinstance(defence, Purifier)]


def fingerprint(classifier: Any) -> str:
    """A hash of all weights, of the purifiers' models too, and of the descriptions of modules and preprocessors."""
    module = classifier.model if isinstance(classifier, PyTorchClassifier) else classifier
    purifiers, before = _purifiers(classifier), getattr(classifier, "preprocessing_defences", None) or []
    modules = [m for m in (module, *(purifier.model for purifier in purifiers)) if isinstance(m, nn.Module)]
    weights = [tensor for m in modules for tensor in m.state_dict().values()]
    return hashed([*map(description, [*modules, *purifiers, *before]), *weights])


def hashed(parts: Sequence[Tensor | str]) -> str:
    """A hash of tensors and strings, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.detach().cpu().contiguous().numpy().tobytes()
        digest.update(f"{len(data)} {getattr(part, 'shape', '')} ".encode() + data)
    return digest.hexdigest()


def certified_table(
    certificates: Mapping[str, Certificates], y: np.ndarray, radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
) -> str:
    """Certified accuracy in percent by radius, as a Markdown table with a row for each smoothed classifier.

    Args:
        certificates: by name; all of images with the classes ``y`` (N,).
        y: class numbers.
        radii: L2 radii in the units of the images. Those beyond a classifier's ``largest_radius`` are marked.
    """
    rows = []
    for name, found in certificates.items():
        cells = [
            f"{100 * found.accuracy(y, radius):.1f}" if radius <= found.largest_radius else "out of reach"
            for radius in radii
        ]
        rows.append([name, *cells, f"{100 * (found.predictions == ABSTAIN).mean():.1f}"])
    return markdown_table(["", *(f"{radius:g}" for radius in radii), "abstained"], rows, left=1)
