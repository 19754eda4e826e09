"""Robustness under adaptive attacks, and grids of attacks and defences: computed, stored, printed and drawn.

- ``robustness``: ``evaluate_robustness`` and its result.
- ``threat``: what an attack sees and how it is set.
- ``protocol``: the attacks of each budget, in order.
- ``diagnostics``: signs that an accuracy cannot be trusted.
- ``smoothing``: certified accuracy.
- ``grid``: tables of accuracies as data.
- ``stages``: classifiers, attacked, purified and classified images of a grid.
- ``store``: their results on disk.
- ``runner``: runs a grid.
- ``table``: prints it.
- ``figures``: charts.
- ``page``: HTML pages.
- ``demo``, ``calibration_report``: what the commands write.
- ``preprocessors``: defences by import path.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from art_pixeldefend.evaluation.robustness import Evaluation, evaluate_robustness
    from art_pixeldefend.evaluation.threat import Threat

__all__ = ["Evaluation", "Threat", "evaluate_robustness"]

_MODULES = {
    "Evaluation": "art_pixeldefend.evaluation.robustness",
    "Threat": "art_pixeldefend.evaluation.threat",
    "evaluate_robustness": "art_pixeldefend.evaluation.robustness",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: modules of this package import each other."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
