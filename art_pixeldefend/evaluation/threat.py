"""What an attacker of a defended classifier sees and does, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from art_pixeldefend.validation import check_choice, check_count

SEES = ("classifier", "scores", "everything")
TOLD = ("eot", "restarts", "steps", "loss", "targets")
GRADIENTS = ("identity", "exact", "implicit", "surrogate", "latent")


@dataclass(frozen=True)
class Threat:
    """What an attack on a classifier behind a defence sees and how much it computes.

    Args:
        sees: ``"classifier"``: the classifier without its defence, as in most papers before 2020. ``"scores"``: the
            logits of both together, without gradients. ``"everything"``: both, with gradients.
        gradient: the defence's backward pass: ``"identity"`` (BPDA: Athalye et al. 2018, arXiv:1802.00420),
            ``"exact"``, ``"implicit"``, that of a ``"surrogate"`` network, or, of a projection onto a generator's
            range, that of the generator (``"latent"``); None: the one that the defence declares.
        eot: draws of the defence's random numbers that each gradient is averaged over.
        restarts: runs from different random starts.
        steps: of gradient ascent, or queries; None for the attack's own number.
        loss: that is maximised; None for the attack's own.
        targets: number of the most likely wrong classes that are aimed at in turn; 0 for any wrong class.
        detector: whether the attack must also pass a detector.
        seeds_known: whether the attacker has the seeds of the defence's random numbers.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> str(Threat("everything", "exact", eot=20, steps=50, loss="margin"))
        'white-box, exact gradient, EOT 20, 50 steps, margin'
        >>> Threat.of("white-box") == Threat("everything")
        True
    """

    sees: str = "classifier"
    gradient: str | None = None
    eot: int = 1
    restarts: int = 1
    steps: int | None = None
    loss: str | None = None
    targets: int = 0
    detector: bool = False
    seeds_known: bool = False

    def __post_init__(self) -> None:
        for name, known in (("sees", SEES), ("gradient", (None, *GRADIENTS))):
            check_choice(name, getattr(self, name), known)
        for name, least in (("eot", 1), ("restarts", 1), ("targets", 0)):
            check_count(name, getattr(self, name), least)
        if self.steps is not None:
            check_count("steps", self.steps)

    @classmethod
    def of(cls, value: Threat | str) -> Threat:
        """Return a threat, or the one that ``"blind"`` or ``"white-box"`` names.

        Raises:
            ValueError: naming ``threat``, for anything else.
        """
        if isinstance(value, Threat):
            return value
        if value not in NAMED:
            raise ValueError(f"threat must be a Threat or one of {', '.join(NAMED)}, got {value!r}")
        return NAMED[value]

    @property
    def name(self) -> str:
        """A short name without spaces: ``"blind"``, ``"black-box"`` or ``"white-box"``, and what is not the default."""
        names = {"classifier": "blind", "scores": "black-box", "everything": "white-box"}
        parts = [f"{key}-{value}" for key, value in self._set().items() if value is not True]
        return "-".join([names[self.sees], *parts, *(key for key, value in self._set().items() if value is True)])

    @property
    def key(self) -> str | dict[str, Any]:
        """What results are stored under: ``"blind"``, ``"white-box"``, or all that is not the default."""
        return self.name if self in NAMED.values() else {"sees": self.sees} | self._set()

    @property
    def settings(self) -> dict[str, Any]:
        """What an attack is told: the values of EOT, restarts, steps, loss and targets that are not the defaults."""
        return {name: value for name, value in self._set().items() if name in TOLD}

    def _set(self) -> dict[str, Any]:
        """The fields other than ``sees`` that are not at their defaults."""
        defaults = {field.name: field.default for field in fields(self)} | {"sees": self.sees}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    def __str__(self) -> str:
        names = {"classifier": "without the defence", "scores": "black-box", "everything": "white-box"}
        unit = "queries" if self.sees == "scores" else "steps"
        parts = [
            names[self.sees],
            f"{self.gradient} gradient" if self.gradient else "",
            f"EOT {self.eot}" if self.eot > 1 else "",
            f"{self.steps} {unit}" if self.steps else "",
            f"{self.restarts} restarts" if self.restarts > 1 else "",
            self.loss or "",
            f"{self.targets} targets" if self.targets else "",
            "passing the detector" if self.detector else "",
            "seeds known" if self.seeds_known else "",
        ]
        return ", ".join(part for part in parts if part)


BLIND, WHITE_BOX = Threat("classifier"), Threat("everything")
NAMED = {"blind": BLIND, "white-box": WHITE_BOX}
