"""Anomaly scores by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from art_pixeldefend.detectors.scores import (
    CODECS,
    ComplexityCorrectedLikelihood,
    DenoisingError,
    Likelihood,
    LikelihoodRatio,
    Score,
    ScoreNorm,
)
from art_pixeldefend.models.base import ImageModel

PIXELCNNPP, DENOISER = "pixelcnnpp", "score"

# name -> the kinds of models it needs, and how it is built from them and from the text after the colon
SCORES: dict[str, tuple[tuple[str, ...], Callable[..., Score]]] = {
    "likelihood": ((PIXELCNNPP,), Likelihood),
    "likelihood-ratio": ((PIXELCNNPP, PIXELCNNPP), LikelihoodRatio),
    "complexity": ((PIXELCNNPP,), ComplexityCorrectedLikelihood),
    "score-norm": ((DENOISER,), ScoreNorm),
    "denoising-error": ((DENOISER,), DenoisingError),
}
PARAMETERS: dict[str, Callable[[str], Any]] = {"complexity": str, "score-norm": float, "denoising-error": float}


def score_named(text: str, models: Sequence[ImageModel]) -> Score:
    """Build a score from its name and the models that it needs.

    Args:
        text: ``"likelihood"``, ``"likelihood-ratio"``, ``"complexity"``, ``"complexity:zlib"``, ``"score-norm:0.02"``
            or ``"denoising-error:0.1"``: a name, and after a colon a codec or a noise level in [0, 1] pixel values.
        models: image models, of which the first ones of the kinds that the score needs are used; the second PixelCNN++
            is the background model of a likelihood ratio.

    Raises:
        ValueError: naming ``score``, for another name, a bad parameter, or if a model is missing.

    Example:
        >>> from art_pixeldefend.models import zoo
        >>> score_named("score-norm:0.05", [zoo.load("digits"), zoo.load("digits-score")])
        ScoreNorm(sigma=0.05)
    """
    name, colon, parameter = text.partition(":")
    if name not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {text!r}")
    kinds, build = SCORES[name]
    if colon and name not in PARAMETERS:
        raise ValueError(f"score {name} has no parameter, got {text!r}")
    used: list[ImageModel] = []
    for kind in kinds:
        found = [model for model in models if model.kind == kind and model not in used]
        if not found:
            count = f"{kinds.count(kind)} " if kinds.count(kind) > 1 else "a "
            raise ValueError(f"score {name} needs {count}model of kind {kind}, got {[m.kind for m in models]}")
        used.append(found[0])
    try:
        return build(*used, *([PARAMETERS[name](parameter)] if colon else []))
    except ValueError as error:
        hint = "a codec, " + " or ".join(CODECS) if name == "complexity" else "a noise level in [0, 1] pixel values"
        raise ValueError(f"score {text!r} is not as described: after the colon stands {hint}") from error
