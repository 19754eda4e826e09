"""PixelDefend (Song et al., ICLR 2018, arXiv:1710.10766) for the Adversarial Robustness Toolbox."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from art_pixeldefend.detectors import PixelDefendDetector
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.pixelcnnpp.decoders import greedy_decode
    from art_pixeldefend.purifiers import AdaptivePixelDefend, PixelDefend

__version__ = "0.1.0"
__all__ = ["AdaptivePixelDefend", "PixelCNNpp", "PixelDefend", "PixelDefendDetector", "greedy_decode"]

_MODULES = {
    "AdaptivePixelDefend": "purifiers",
    "PixelCNNpp": "models.pixelcnnpp",
    "PixelDefend": "purifiers",
    "PixelDefendDetector": "detectors",
    "greedy_decode": "models.pixelcnnpp.decoders",
}


def __getattr__(name: str) -> Any:
    """Import torch and ART, seconds of work, when one of their classes is asked for: not for ``--help``."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
