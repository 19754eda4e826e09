"""A detector that calibrates one or several anomaly scores on clean images."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.defences.detector.evasion import EvasionDetector
from torch import Tensor
from tqdm import tqdm

from art_pixeldefend import datasets
from art_pixeldefend.batches import map_batches
from art_pixeldefend.detectors.conformal import (
    COMBINATIONS,
    CONDITIONS,
    RATES,
    SIMULATIONS,
    combine_p_values,
    conditional_p_values,
    conformal_p_values,
    flagged_by_rate,
    joint_p_values,
    least_calibration_images,
)
from art_pixeldefend.detectors.relaxation import JointLogPValues, LogPValues, combine_logs
from art_pixeldefend.detectors.scores import Score
from art_pixeldefend.levels import ClipValues, Images, as_tensor, check_clip_values, from_levels
from art_pixeldefend.models import checkpoint
from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.validation import (
    all_or_none,
    check_attributes,
    check_bool,
    check_choice,
    check_count,
    check_number,
    check_rate,
    check_seed,
)

KIND = "conformal-detector"


class ConformalDetector(EvasionDetector):
    """Detect adversarial images by one or several scores, with the false-positive rate that is asked for.

    Each score of an image is ranked among those of clean calibration images (split-conformal p-values, Vovk et al.
    2005), and the p-values of all scores are combined into one. Images with p-values up to ``alpha`` are flagged. For
    images that are exchangeable with the calibration images, and that no model was trained on, the false-positive rate
    is at most ``alpha`` on average over calibration sets. Nothing is guaranteed about adversarial images.

    Args:
        scores: one or several :class:`~art_pixeldefend.detectors.Score`; their own ``seed`` has no effect here.
        combine: how the p-values of several scores become one:

            - ``"bonferroni"``, ``"harmonic"``: valid however the scores depend on each other.
            - ``"cauchy"``: an approximation for small p-values, which can be too small for dependent scores.
            - ``"joint"``: the product of the ranks (Fisher) is calibrated as a whole. Valid however the
              scores depend on each other, and less conservative than the first two.

            See :func:`~art_pixeldefend.detectors.conformal.combine_p_values` and
            :func:`~art_pixeldefend.detectors.conformal.joint_p_values`.
        alpha: significance level, 0 < alpha <= 1.
        two_sided: whether low scores are anomalous, too; for all scores, or one bool for each.
        conditional: None, or ``"simes"``, ``"dkwm"`` or ``"monte-carlo"``: larger p-values, for which the
            false-positive rate is at most ``alpha`` with probability 1 - ``delta`` over calibration sets, instead of on
            average (Bates et al. 2023, arXiv:2104.08279). Not for ``"joint"``.
        delta: the probability of a calibration set whose false-positive rate is larger than ``alpha``, if
            ``conditional``. It is divided among the scores and their sides.
        ties: ``"random"``: an image whose score equals that of calibration images gets a random rank among them, which
            makes p-values of clean images uniform. ``"conservative"``: it gets the last of these ranks, as it always
            does if ``conditional``.
        round_to_levels: round images to 8-bit levels before they are scored, as saving them would.
        clip_values: (minimum, maximum) of the images: levels 0 and 255.
        batch_size: images scored at a time.
        verbose: show progress bars.
        seed: of ties, whose order is a function of the seed and the image's levels, and of stochastic scores, which are
            functions of the seed and the image's position in ``x``. None draws a new seed from torch's global generator
            at each call; use it for stochastic scores of images that are detected one by one.

    Attributes:
        calibration_scores: scores (N, K) of the calibration images; None before :meth:`fit`.
        reference: what these images are.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> from art_pixeldefend import datasets
        >>> from art_pixeldefend.detectors import Likelihood, ScoreNorm
        >>> data = datasets.load("digits")
        >>> detector = ConformalDetector([Likelihood("digits"), ScoreNorm("digits-score")], clip_values=(0, 255))
        >>> detector.fit(data.x_test[200:])
        >>> noise = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8))
        >>> report, is_adversarial = detector.detect(np.concatenate([data.x_test[:2], noise]))
        >>> is_adversarial.tolist()
        [False, False, True, True]
        >>> report["p_values"].shape, report["score_p_values"].shape
        ((4,), (4, 2))
    """

    defence_params = [
        "scores", "combine", "alpha", "two_sided", "conditional", "delta", "ties", "round_to_levels", "clip_values",
        "batch_size", "verbose", "seed",
    ]  # fmt: skip
    calibration_scores: np.ndarray | None
    reference: str | None = "calibration"

    def __init__(
        self,
        scores: Score | Sequence[Score],
        combine: str = "bonferroni",
        alpha: float = 0.05,
        *,
        two_sided: bool | Sequence[bool] = False,
        conditional: str | None = None,
        delta: float = 0.1,
        ties: str = "random",
        round_to_levels: bool = False,
        clip_values: ClipValues = (0.0, 1.0),
        batch_size: int = 128,
        verbose: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.scores, self.combine, self.alpha, self.two_sided = scores, combine, alpha, two_sided
        self.conditional, self.delta, self.ties, self.round_to_levels = conditional, delta, ties, round_to_levels
        self.clip_values, self.batch_size, self.verbose, self.seed = clip_values, batch_size, verbose, seed
        self.calibration_scores = None
        self._check_params()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images; None for any shape."""
        return next((score.image_shape for score in self._scores if score.image_shape is not None), None)

    def models(self) -> list[ImageModel]:
        """The image models of the scores, none of which may have been trained on calibration images."""
        return [model for score in self._scores for model in score.models()]

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        batch_size: int | None = None,
        nb_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        """Score calibration images, with which later images are compared.

        Args:
            x: clean images (N, C, H, W) or (N, H, W, C) within ``clip_values`` that the scores' models were not trained
                on; :meth:`art_pixeldefend.datasets.Dataset.calibration` gives suitable ones. There is a warning if some
                of them are known to be training images of a model
                (:func:`art_pixeldefend.datasets.training_images_in`).
            y: not used.
            batch_size: images scored at a time, if not the detector's own.
            nb_epochs: not used.

        Raises:
            ValueError: naming ``x``: too few to flag any at ``alpha``, a wrong shape, NaN or infinity, or values
                outside ``clip_values``; or naming the score that gives NaN.
        """
        self._check_params()
        self._calibrate(x, batch_size)

    def _calibrate(self, x: Any, batch_size: int | None, training: bool = False) -> None:
        """Take the scores of ``x`` for comparison; ``training`` says that they are known to be training images."""
        images, tensor = self._images(x)
        self._check_enough(len(tensor))
        if not training:
            self._warn_of_training_images(images, tensor)
        scores = self._score(images, tensor, batch_size, self._call_seed(0))
        for k in range(scores.shape[1]):
            if nan := int(np.isnan(scores[:, k]).sum()):
                raise ValueError(f"{self._name(k)} must give numbers, got NaN for {nan} of {len(scores)} images")
        self.calibration_scores = scores

    def detect(self, x: np.ndarray, batch_size: int | None = None, **kwargs: Any) -> tuple[dict, np.ndarray]:
        """Compute p-values of images, and flag those of at most ``alpha``.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``.
            batch_size: images scored at a time, if not the detector's own.

        Returns:
            (report, is_adversarial): the report holds the combined ``p_values`` (N,), ``score_p_values`` (N, K) of each
            score, ``scores`` (N, K) and the level ``alpha``; is_adversarial is boolean (N,). Images with a score of NaN
            are flagged, with the least p-value that there is.

        Raises:
            ValueError: if the detector has not been fitted, or naming ``x``, or ``alpha`` if it is too small for the
                number of calibration images.
        """
        return self._decide(self._report(x, batch_size))

    def detect_stream(
        self, batches: Iterable[Any], total: int | None = None, batch_size: int | None = None
    ) -> Iterator[tuple[dict, np.ndarray]]:
        """Detect images that arrive batch by batch, in the memory of one batch.

        The results are those of :meth:`detect` for all images together. ``verbose`` shows a progress bar.

        Args:
            batches: yields images as :meth:`detect` takes them, or tuples or lists of which they are the first element,
                as a ``torch.utils.data.DataLoader`` with labels does.
            total: the number of all images, for the progress bar; by default that of ``batches.dataset``, if any.
            batch_size: images scored at a time, if not the detector's own.

        Returns:
            An iterator over the results of :meth:`detect` for each batch.

        Raises:
            ValueError: as :meth:`detect`; for ``x`` when the batch is reached.

        Example:
            >>> from art_pixeldefend import datasets
            >>> from art_pixeldefend.detectors import Likelihood
            >>> x = datasets.load("digits").x_test
            >>> detector = ConformalDetector(Likelihood("digits"), clip_values=(0, 255))
            >>> detector.fit(x[200:])
            >>> [len(flags) for report, flags in detector.detect_stream(x[i : i + 8] for i in range(0, 20, 8))]
            [8, 8, 8]
        """
        self._check_fitted()
        if total is None and hasattr(getattr(batches, "dataset", None), "__len__"):
            total = len(batches.dataset)  # type: ignore[attr-defined]
        return self._stream(batches, total, batch_size)

    def _stream(
        self, batches: Iterable[Any], total: int | None, batch_size: int | None
    ) -> Iterator[tuple[dict, np.ndarray]]:
        seed, start = self._call_seed(1), 0
        with tqdm(total=total, unit="image", desc="detect", disable=not self.verbose) as bar:
            for batch in batches:
                images, tensor = self._images(batch[0] if isinstance(batch, (tuple, list)) else batch)
                scores = self._score(images, tensor, batch_size, seed, start, verbose=False)
                yield self._decide(self._p_values(scores, self._ties(images, tensor, seed)))
                start += len(scores)
                bar.update(len(scores))

    def _shown(self, report: dict[str, np.ndarray]) -> dict[str, Any]:
        """What users get of a report of scores and p-values."""
        return report

    def _decide(self, report: dict[str, np.ndarray]) -> tuple[dict, np.ndarray]:
        """The result of :meth:`detect`, of a report of scores and p-values."""
        is_adversarial = (report["p_values"] <= self.alpha) | _any_nan(report["scores"])
        return self._shown(report) | {"alpha": self.alpha}, is_adversarial

    def detect_batch(
        self, x: np.ndarray, q: float = 0.1, method: str = "bh", batch_size: int | None = None
    ) -> tuple[dict, np.ndarray]:
        """Flag images of a batch such that at most a share ``q`` of the flagged ones is clean, on average.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``.
            q: the false discovery rate, 0 < q <= 1.
            method: ``"bh"``: Benjamini-Hochberg. ``"storey"``: the same with an estimate of the share of clean images,
                which flags more if many are adversarial, and fewer if hardly any are. Both are proven for a single
                score (Bates et al. 2023, arXiv:2104.08279), whose p-values depend on each other through the
                calibration images only.
                ``"by"``: Benjamini-Yekutieli, for any dependence, and so for any combination of scores.
            batch_size: images scored at a time, if not the detector's own.

        Returns:
            (report, is_adversarial): the report of :meth:`detect`, with ``q_values`` (N,), the least ``q`` for which an
            image is flagged, and ``q`` in place of ``alpha``; is_adversarial is boolean (N,). Images with a score of
            NaN are always flagged.

        Raises:
            ValueError: naming ``q`` or ``method``, or as :meth:`detect`.
        """
        q = check_rate("q", q)
        check_choice("method", method, RATES)
        report = self._report(x, batch_size)
        q_values, flagged = flagged_by_rate(report["p_values"], report["scores"], q, method)
        return self._shown(report) | {"q_values": q_values, "q": q}, flagged

    # Gradients, for attacks that include the detector

    def margin(self, x: Tensor, *, start: int = 0, seed: int | None = None) -> Tensor:
        """A differentiable approximation of log(alpha / p), which is positive for images that are flagged.

        P-values are ranks. Here they are interpolated between those of about fifty calibration images and extrapolated
        beyond the highest scores, so that images have a gradient wherever the scores have one. It is meant for
        attacks; whether an image is flagged is for :meth:`detect` to say, after the image is rounded to levels.

        Args:
            x: images (N, C, H, W) in [0, 1], floating-point, on any device.
            start, seed: as for :meth:`scores_of`.

        Returns:
            (N,), float64, differentiable with respect to ``x`` where the scores are.

        Raises:
            ValueError: if the detector has not been fitted, or naming ``x``.

        Example:
            >>> from art_pixeldefend import datasets
            >>> from art_pixeldefend.detectors import Likelihood
            >>> data, detector = datasets.load("digits"), ConformalDetector(Likelihood("digits"), clip_values=(0, 255))
            >>> detector.fit(data.x_test[200:])
            >>> x = torch.rand(2, 1, 8, 8, requires_grad=True)
            >>> margin = detector.margin(x)  # of noise, which is flagged
            >>> bool((margin > 0).all()), torch.autograd.grad(margin.sum(), x)[0].shape
            (True, torch.Size([2, 1, 8, 8]))
        """
        return self.margin_of(self.scores_of(x, start=start, seed=seed))

    def scores_of(self, x: Tensor, *, start: int = 0, seed: int | None = None) -> Tensor:
        """The scores of images, differentiable with respect to them where the scores are.

        Args:
            x: images (N, C, H, W) in [0, 1], floating-point, on any device.
            start: position of the first image in the whole input, on which stochastic scores depend.
            seed: of stochastic scores; by default that with which :meth:`detect` scores.

        Returns:
            (N, K), float64.

        Raises:
            ValueError: naming ``x``.
        """
        self._check_params()
        seed = self._call_seed(1) if seed is None else seed
        return torch.stack([score(x, start=start, seed=seed).double() for score in self._scores], dim=1)

    def flagged_of(self, scores: np.ndarray) -> np.ndarray:
        """Whether :meth:`detect` flags images of these scores (N, K), or may flag them where ties are random.

        Raises:
            ValueError: if the detector has not been fitted.
        """
        self._check_fitted()
        ties = np.zeros((len(scores), len(self._scores) + 1)) if self._breaks_ties else None
        return self._decide(self._p_values(scores, ties))[1]

    def margin_of(self, scores: Tensor) -> Tensor:
        """:meth:`margin`, of the scores (N, K) of images.

        Raises:
            ValueError: if the detector has not been fitted.
        """
        self._check_fitted()
        return math.log(self.alpha) - self._log_p_values(scores)

    def _log_p_values(self, scores: Tensor) -> Tensor:
        """Approximate combined log p-values (M,) of scores (M, K), differentiable."""
        assert self.calibration_scores is not None
        calibration, count = self.calibration_scores, len(self.calibration_scores)
        if self.combine == "joint":
            return JointLogPValues(calibration, self._sides)(scores)

        def adjust(p_values: np.ndarray) -> np.ndarray:
            return self._raise(p_values, count) if self.conditional else p_values

        logs = [LogPValues(calibration[:, k], sides, adjust)(scores[:, k]) for k, sides in enumerate(self._sides)]
        return combine_logs(torch.stack(logs, dim=1), self.combine)

    def predict(self, x: np.ndarray, batch_size: int | None = None, **kwargs: Any) -> np.ndarray:
        """log(alpha / p) of images, above 0 for those that :meth:`detect` flags: a logit for ART.

        With :meth:`class_gradient`, this is what ART's ``DetectorClassifier(classifier, detector)`` needs.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``.
            batch_size: images scored at a time, if not the detector's own.

        Returns:
            (N, 1), float32.

        Raises:
            ValueError: as :meth:`detect`.
        """
        report, flagged = self._decide(self._report(x, batch_size))
        logits = np.log(self.alpha / report["p_values"]).astype(np.float32)
        least = np.finfo(np.float32).tiny
        return np.where(flagged, np.maximum(logits, least), np.minimum(logits, 0))[:, None]

    def class_gradient(
        self, x: np.ndarray, label: Any = None, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """The gradient of :meth:`margin` with respect to images.

        Args:
            x: images (N, C, H, W) or (N, H, W, C) within ``clip_values``.
            label: not used: there is one output.
            training_mode: not used.

        Returns:
            (N, 1, C, H, W) or (N, 1, H, W, C), of the dtype of ``x`` if that is floating-point, else float32.

        Raises:
            ValueError: as :meth:`detect`.
        """
        self._check_fitted()
        images, tensor = self._images(x)
        tensor = tensor if tensor.is_floating_point() else tensor.float()

        def gradient(positions: Tensor) -> Tensor:
            start = int(positions[0]) if len(positions) else 0
            leaf = tensor[start : start + len(positions)].clone().requires_grad_()
            with torch.enable_grad():
                unit = images.to_unit(leaf).clamp(0, 1).float()
                total = self.margin(unit, start=start).sum() if len(leaf) else leaf.sum()
                return torch.autograd.grad(total, leaf)[0].cpu()

        found = map_batches(gradient, torch.arange(len(tensor), device="cpu"), self.batch_size)
        return found.numpy()[:, None]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the calibration images' scores as safetensors, with fingerprints of the scores and their models.

        Raises:
            ValueError: if the detector has not been fitted.
            OSError: if the file cannot be written; nothing partial is left.
        """
        if self.calibration_scores is None:
            raise ValueError("the detector must be fitted, with fit(x_calibration), before it is saved")
        checkpoint.write(path, {"calibration_scores": torch.from_numpy(self.calibration_scores)}, self._header())

    def load(self, path: str | PathLike[str]) -> None:
        """Take the scores that :meth:`save` wrote, in place of :meth:`fit`. Nothing is unpickled.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, corrupted, something else, or of other scores or models, or holds too
                few for ``alpha``.
        """
        self._check_params()
        tensors, header = checkpoint.read(path)
        if header.get("kind") != KIND or "calibration_scores" not in tensors:
            raise ValueError(f"path {str(Path(path))!r} is not a file of a ConformalDetector")
        expected = self._header()
        if header.get("scores") != expected["scores"]:
            raise ValueError(f"path {str(Path(path))!r} holds calibration scores of other scores or models")
        if header.get("round_to_levels") != expected["round_to_levels"]:
            raise ValueError(f"path {str(Path(path))!r} is of round_to_levels={header.get('round_to_levels')!r}")
        scores = tensors["calibration_scores"].numpy()
        self._check_enough(len(scores))
        self.calibration_scores = scores

    def _header(self) -> dict[str, Any]:
        fingerprints = [score.fingerprint() for score in self._scores]
        return {"kind": KIND, "scores": fingerprints, "round_to_levels": self.round_to_levels}

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name. After a change of the scores, :meth:`fit` or :meth:`load` again.

        Raises:
            ValueError: naming the parameter that is not as described; all of them are left as they were.
        """
        with all_or_none(self):
            if any(kwargs.get(name, before) is not before for name, before in self._determining().items()):
                self.calibration_scores = None
            super().set_params(**kwargs)

    def _determining(self) -> dict[str, Any]:
        """The parameters that the calibration images' scores depend on."""
        return {"scores": self.scores, "round_to_levels": self.round_to_levels}

    # Scores and p-values

    @property
    def _scores(self) -> tuple[Score, ...]:
        return tuple(self.scores)  # type: ignore[arg-type]  # _check_params makes a tuple of it

    def _name(self, k: int) -> str:
        """The name of a score, for messages."""
        return f"scores[{k}], {self._scores[k]!r},"

    def _images(self, x: Any) -> tuple[Images, Tensor]:
        """Check images; return their converter and the tensor."""
        tensor = (x if isinstance(x, Tensor) else as_tensor(x)).detach()
        images = Images(self.image_shape, self.clip_values)
        if found := images.check(tensor):
            raise ValueError(f"x must be within clip_values {images.shown}, got {found}")
        return images, tensor

    def _score(
        self,
        images: Images,
        tensor: Tensor,
        batch_size: int | None,
        seed: int,
        first: int = 0,
        verbose: bool | None = None,
    ) -> np.ndarray:
        """Scores (N, K), float64, of images of which the first has the position ``first``."""
        size = self.batch_size if batch_size is None else check_count("batch_size", batch_size)
        if not len(tensor):
            return np.zeros((0, len(self._scores)))

        def score(positions: Tensor) -> Tensor:
            start = int(positions[0])
            part = tensor[start : start + len(positions)]
            if self.round_to_levels:
                unit = from_levels(images.to_levels(part))
            else:
                unit = images.to_unit(part).clamp(0, 1).float()
            values = [score(unit, start=first + start, seed=seed).double().cpu() for score in self._scores]
            return torch.stack(values, dim=1)

        verbose = self.verbose if verbose is None else verbose
        with torch.no_grad():
            return map_batches(
                score, torch.arange(len(tensor), device="cpu"), size, verbose=verbose, what="score"
            ).numpy()

    def _report(self, x: Any, batch_size: int | None) -> dict[str, np.ndarray]:
        """Scores and p-values of images."""
        self._check_fitted()
        seed = self._call_seed(1)
        images, tensor = self._images(x)
        return self._p_values(self._score(images, tensor, batch_size, seed), self._ties(images, tensor, seed))

    def _check_fitted(self) -> None:
        if self.calibration_scores is None:
            raise ValueError("the detector must be fitted, with fit(x_calibration) or load(path), before it detects")
        self._check_params()  # attributes may have been set

    def _ties(self, images: Images, tensor: Tensor, seed: int) -> np.ndarray | None:
        """Numbers (M, K + 1), uniform in [0, 1), that order ties: hashes of the seed and an image's levels."""
        if not self._breaks_ties:
            return None
        number, prefix = len(self._scores) + 1, seed.to_bytes(16, "big")
        levels = np.ascontiguousarray(images.to_levels(tensor).cpu().numpy())
        hashes = [hashlib.shake_256(prefix + image.tobytes()).digest(8 * number) for image in levels]
        return (np.frombuffer(b"".join(hashes), np.uint64) >> 11).reshape(-1, number) * 2.0**-53

    @property
    def _breaks_ties(self) -> bool:
        """Whether random numbers order ties."""
        return self.ties == "random" and not self.conditional

    def _p_values(self, scores: np.ndarray, random: np.ndarray | None) -> dict[str, np.ndarray]:
        """The report: combined p-values (M,), those of each score (M, K), and the scores.

        The numbers ``random`` (M, K + 1), in [0, 1), order ties of each score and of the joint one, 0 being the first.
        """
        assert self.calibration_scores is not None
        calibration = self.calibration_scores
        each = np.empty_like(scores)
        for k, two_sided in enumerate(self._sides):
            column, of_calibration = scores[:, k], calibration[:, k]
            if self.conditional:
                each[:, k] = self._raise(conformal_p_values(column, of_calibration), len(calibration))
                if two_sided:
                    low = self._raise(conformal_p_values(-column, -of_calibration), len(calibration))
                    each[:, k] = np.minimum(2 * np.minimum(each[:, k], low), 1.0)
            else:
                order = None if random is None else random[:, k]
                each[:, k] = conformal_p_values(column, of_calibration, two_sided=two_sided, ties=order)
        if self.combine == "joint":
            combined = joint_p_values(scores, calibration, self._sides, None if random is None else random[:, -1])
        else:
            combined = combine_p_values(each, self.combine)
        combined = np.where(_any_nan(scores), self._least_p_value(len(calibration)), combined)
        return {"p_values": combined, "score_p_values": each, "scores": scores}

    def _raise(self, p_values: np.ndarray, count: int) -> np.ndarray:
        """Calibration-conditional p-values; ``delta`` is divided among scores and sides."""
        assert self.conditional is not None
        return conditional_p_values(
            p_values, count, self.delta / (len(self._sides) + sum(self._sides)), self.conditional
        )

    @property
    def _sides(self) -> tuple[bool, ...]:
        """For each score, whether low values are anomalous, too."""
        return (self.two_sided,) * len(self._scores) if isinstance(self.two_sided, bool) else tuple(self.two_sided)

    def _least_p_value(self, count: int) -> float:
        """The least possible p-value with ``count`` calibration images: the least of every score, combined."""
        least = np.array([[1 / (count + 1)]])
        if self.combine == "joint":
            return float(least[0, 0])
        least = self._raise(least, count) if self.conditional else least
        each = np.concatenate([np.minimum(least * (1 + two_sided), 1.0) for two_sided in self._sides], axis=1)
        return float(combine_p_values(each, self.combine)[0])

    def _call_seed(self, call: int) -> int:
        """The seed of a call: different ones for calibration (0) and detection (1), whose numbers are independent."""
        return int(torch.randint(2**62, (), device="cpu")) if self.seed is None else 2 * self.seed + call

    # Checks

    def _check_params(self) -> None:
        scores = (self.scores,) if isinstance(self.scores, Score) else self.scores
        if not isinstance(scores, (list, tuple)) or not scores or not all(isinstance(s, Score) for s in scores):
            raise ValueError(f"scores must be one or several Score objects, got {scores!r}")
        if not isinstance(self.scores, tuple):
            self.scores = tuple(scores)
        if len(shapes := {score.image_shape for score in scores} - {None}) > 1:
            raise ValueError(f"scores must be of images of one shape, got {', '.join(map(str, sorted(shapes)))}")
        check_choice("combine", self.combine, COMBINATIONS)
        if not isinstance(self.two_sided, bool):
            sides = self.two_sided
            if not isinstance(sides, (list, tuple)) or len(sides) != len(scores) or {*map(type, sides)} != {bool}:
                raise ValueError(f"two_sided must be a bool, or one for each of {len(scores)} scores, got {sides!r}")
        check_choice("conditional", self.conditional, (None, *CONDITIONS))
        if self.conditional and self.combine == "joint":
            raise ValueError('conditional must be None for combine="joint", which ranks images with each other')
        self.delta = check_number("delta", self.delta, high=1.0)
        parts = len(self._sides) + sum(self._sides)
        if not 0 < self.delta < 1 or (self.conditional == "monte-carlo" and self.delta * (SIMULATIONS + 1) < parts):
            least = f", at least {parts}/{SIMULATIONS + 1}" if self.conditional == "monte-carlo" else ""
            raise ValueError(f"delta must be between 0 and 1{least}, got {self.delta:g}")
        check_choice("ties", self.ties, ("random", "conservative"))
        check_attributes(self, check_bool, "round_to_levels", "verbose")
        self.clip_values = check_clip_values(self.clip_values)
        self.batch_size = check_count("batch_size", self.batch_size)
        self.seed = check_seed("seed", self.seed)
        self.alpha = check_rate("alpha", self.alpha)
        if self.calibration_scores is None:
            return
        count = len(self.calibration_scores)
        if (least_p := self._least_p_value(count)) > self.alpha:
            shown = f"1/{count + 1}" if least_p == 1 / (count + 1) else f"{least_p:.3g}"
            raise ValueError(f"alpha must be at least {shown} with {count} calibration images, got {self.alpha}")

    def least_images(self) -> int:
        """The least number of calibration images: with fewer, no p-value reaches ``alpha``."""
        return least_calibration_images(self.alpha, self._least_p_value)

    def _check_enough(self, count: int) -> None:
        if not count or self._least_p_value(count) > self.alpha:
            raise ValueError(f"x must hold at least {self.least_images()} images for alpha {self.alpha:g}, got {count}")

    def _warn_of_training_images(self, images: Images, tensor: Tensor) -> None:
        """Warn if some of the images are among those that a model was trained on, by the hashes in its provenance."""
        levels = images.to_levels(tensor).cpu().numpy()
        for model in self.models():
            if datasets.training_images_in(levels, model):
                warnings.warn(
                    f"x holds images that the {model.kind} model of the scores was trained on; more clean images than "
                    "alpha will be flagged",
                    stacklevel=4,
                )


def _any_nan(scores: np.ndarray) -> np.ndarray:
    """Whether any score of an image is NaN, (N,)."""
    return np.isnan(scores).any(axis=1)
