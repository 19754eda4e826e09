"""Purify and detect adversarial images with generative models, for the Adversarial Robustness Toolbox.

PixelDefend (Song et al., ICLR 2018, arXiv:1710.10766), purification with score models, the deep image prior and the
Robust Manifold Defense.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from art_pixeldefend.detectors import ConformalDetector, PixelDefendDetector
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.pixelcnnpp.decoders import greedy_decode
    from art_pixeldefend.purifiers import (
        AdaptivePixelDefend,
        DeepImagePrior,
        ManifoldProjection,
        PixelDefend,
        PurifiedModel,
        ScoreDenoiser,
        ScorePurifier,
    )

__version__ = "0.2.0.dev0"
__all__ = [
    "AdaptivePixelDefend",
    "ConformalDetector",
    "DeepImagePrior",
    "ManifoldProjection",
    "PixelCNNpp",
    "PixelDefend",
    "PixelDefendDetector",
    "PurifiedModel",
    "ScoreDenoiser",
    "ScorePurifier",
    "greedy_decode",
]

_MODULES = {
    "AdaptivePixelDefend": "purifiers",
    "ConformalDetector": "detectors",
    "DeepImagePrior": "purifiers",
    "ManifoldProjection": "purifiers",
    "PixelCNNpp": "models.pixelcnnpp",
    "PixelDefend": "purifiers",
    "PixelDefendDetector": "detectors",
    "PurifiedModel": "purifiers",
    "ScoreDenoiser": "purifiers",
    "ScorePurifier": "purifiers",
    "greedy_decode": "models.pixelcnnpp.decoders",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and ART take seconds, which ``--help`` need not wait for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
