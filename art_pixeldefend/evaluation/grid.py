"""Tables of accuracies as data: rows of classifier, defence and threat, columns of attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.classifiers import NETWORKS, RECIPES, TECHNIQUES
from art_pixeldefend.evaluation.preprocessors import CALIBRATED, Step, placeholders
from art_pixeldefend.evaluation.threat import BLIND, WHITE_BOX, Threat
from art_pixeldefend.validation import check_choice, check_count, check_eps

EARLIER_NAMES = {"none/bare": "none", "bare": "blind", "through": "white-box"}  # of rows, in results of version 0.1
REFERENCES = ("calibration", "training")
CLEAN = "clean"


@dataclass(frozen=True)
class Row:
    """A classifier behind a defence, and what the attacker knows of them.

    Args:
        network, training: keys of ``classifiers.NETWORKS`` and ``classifiers.TECHNIQUES``.
        defence: a key of the grid's defences, or ``"none"``.
        threat: a :class:`~art_pixeldefend.evaluation.threat.Threat`, or the name of one. ``"blind"``: the attacks see
            the classifier without its defence. ``"white-box"``: they see both, with the gradients that the defence
            declares. A row without a defence is always white-box. What a threat says of restarts, steps, loss, targets
            and EOT is passed to attacks that take it.
        attacks: the columns to run, if not the grid's.
        images: how many, if not the grid's.
        delta: standard deviation of adversarial training's radius, in levels, if not the grid's.
        eps: radii of attack to run, in levels, if not the grid's.
        steps: of the classifier's training, if not the grid's.

    Example:
        >>> Row("resnet", "normal", "pixeldefend").name
        'resnet/normal/pixeldefend/blind'
    """

    network: str = "resnet"
    training: str = "normal"
    defence: str = "none"
    threat: Threat = BLIND
    attacks: tuple[str, ...] | None = None
    images: int | None = None
    delta: float | None = None
    eps: tuple[int, ...] | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        threat = Threat.of(self.threat)
        object.__setattr__(self, "threat", WHITE_BOX if self.defence == "none" and threat == BLIND else threat)

    @property
    def name(self) -> str:
        """network/training/defence/threat, with delta if it is set and without the threat if there is no defence."""
        delta = "" if self.delta is None else f"-delta-{self.delta:g}"
        threat = "" if self.defence == "none" else f"/{self.threat.name}"
        return f"{self.network}/{self.training}{delta}/{self.defence}{threat}"

    @property
    def adversarial(self) -> bool:
        """Whether its classifier is trained adversarially, and so has a delta."""
        return self.training.startswith("adversarial")

    @property
    def classifier(self) -> Row:
        """The row of the same classifier without a defence."""
        return Row(self.network, self.training, delta=self.delta, steps=self.steps)


@dataclass(frozen=True)
class Cell:
    """One number of the table: a row under an attack with a radius in levels (0 for clean images)."""

    row: Row
    attack: str
    eps: int

    @property
    def name(self) -> str:
        """The row's name, the attack's name and the radius."""
        return f"{self.row.name} {self.attack}" + (f" {self.eps}" if self.eps else "")


@dataclass(frozen=True)
class Grid:
    """Everything that determines a table.

    Args:
        dataset: name or path, as ``datasets.load`` takes it.
        rows: of the table.
        eps: radii of attack, in levels.
        attacks: the columns, keys of ``attacks.ATTACKS``.
        defences: ART preprocessors by name, each a tuple of (import path, arguments) which are applied in turn. An
            argument may be ``"{name}"`` for a model of ``models``, or ``"{calibrated}"`` for a threshold that the
            defence's ``calibrate`` chooses. Stochastic defences need no seed: torch's and NumPy's global generators
            are seeded whenever a defence runs.
        models: image models by name: bundled names or paths.
        recipe: of the classifiers, a key of ``classifiers.RECIPES``.
        steps: of the recipe, if not its own.
        sizes: of the networks, by name, if not the paper's.
        delta: of adversarial training, in levels; a row may have its own.
        images: the first so many test images.
        validation: how many test images, of those that the data set reserves, choose a threshold; as many training
            images, the last, train no classifier.
        chunk: images computed at a time; at most one chunk per process is lost when a run is interrupted.
        seed: of everything random.
        reference: what the figures' p-values and ROC curves compare with: ``"calibration"`` images, which the density
            model has not seen, or its ``"training"`` images, as in the paper.
        paper: returns published percentages to print beside the table's, for (grid, row, column, eps), or None.
        notes: remarks by the names of defences, printed under tables with such a row.

    Raises:
        ValueError: naming the argument that is not as described.

    Example:
        >>> noise = ("art.defences.preprocessor.GaussianAugmentation", {"clip_values": (0, 1), "augmentation": False})
        >>> grid = Grid("digits", (Row("vgg"), Row("vgg", defence="noise")), (40,), ("fgsm",), {"noise": (noise,)})
        >>> [cell.name for cell in grid.cells()][-1]
        'vgg/normal/noise/blind fgsm 40'
    """

    dataset: str
    rows: tuple[Row, ...]
    eps: tuple[int, ...]
    attacks: tuple[str, ...] = ("fgsm", "bim")
    defences: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    recipe: str = "quick"
    steps: int | None = None
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    delta: float = 8
    images: int = 1000
    validation: int = 100
    chunk: int = 50
    seed: int = 0
    reference: str = "calibration"
    paper: Callable[[Grid, Row, str, int], float | None] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("validation", 0), ("chunk", 1)):
            check_count(name, getattr(self, name), least)
        for eps in self.eps:
            check_eps("eps", eps)
        runnable = [name for name, attack in ATTACKS.items() if not attack.needs]
        _check("attacks", self.attacks, runnable)
        _check("recipe", (self.recipe,), RECIPES)
        _check("reference", (self.reference,), REFERENCES)
        for row in self.rows:
            _check("network", (row.network,), NETWORKS)
            _check("training", (row.training,), TECHNIQUES)
            _check("defence", (row.defence,), {"none": (), **self.defences})
            _check("attacks", row.attacks or (), runnable)
            self._check_threat(row)
            if row.delta is not None and not (row.adversarial and row.delta > 0):
                raise ValueError(
                    f"delta must be positive, and the training adversarial, got {row.delta!r} in {row.name}"
                )
            for eps in row.eps or ():
                if eps not in self.eps:
                    raise ValueError(f"eps of {row.name} must be of the grid's {self.eps}, got {eps!r}")
        for name, steps in self.defences.items():
            known = [CALIBRATED, *(f"{{{model}}}" for model in self.models)]
            _check(f"placeholders of defence {name!r}", placeholders(steps), known)
        self._check_distinct()

    def _check_threat(self, row: Row) -> None:
        """Check that the row's attacks can do what its threat says."""
        if row.threat.detector or row.threat.gradient in ("surrogate", "latent"):
            unsupported = "detector, surrogate or latent gradient"
            raise ValueError(f"threat of {row.name} must have no {unsupported}: no grid supports them")
        for attack in self.attacks_of(row):
            unknown = set(row.threat.settings) - set(ATTACKS[attack].settings)
            if ATTACKS[attack].sees_classifier and unknown:
                raise ValueError(f"threat of {row.name} must not set {', '.join(sorted(unknown))} for {attack}")

    def _check_distinct(self) -> None:
        """Check that no two rows share a line of the table, which shows only these settings."""
        lines: dict[tuple[Any, ...], str] = {}
        for row in self.rows:
            for eps in self.eps_of(row):
                line = (row.network, row.training, self.delta_of(row), row.defence, row.threat, eps)
                if line in lines:
                    raise ValueError(
                        f"rows must differ in network, training, delta, defence, threat or eps, got {lines[line]} and "
                        f"{row.name} within {eps} levels"
                    )
                lines[line] = row.name

    def cells(self) -> Iterator[Cell]:
        """Yield every number of the table, row by row, clean images first."""
        for row in self.rows:
            yield Cell(row, CLEAN, 0)
            for attack in self.attacks_of(row):
                for eps in self.eps_of(row):
                    yield Cell(row, attack, eps)

    def attacks_of(self, row: Row) -> tuple[str, ...]:
        """Return the attacks on a row."""
        return self.attacks if row.attacks is None else row.attacks

    def eps_of(self, row: Row) -> tuple[int, ...]:
        """Return a row's radii of attack, in levels."""
        return self.eps if row.eps is None else row.eps

    def delta_of(self, row: Row) -> float | None:
        """Return the delta of a row's classifier, or None if it is not trained adversarially."""
        return None if not row.adversarial else self.delta if row.delta is None else row.delta

    def steps_of(self, row: Row) -> int | None:
        """Return the training steps of a row's classifier, or None for those of the recipe."""
        return self.steps if row.steps is None else row.steps

    def images_of(self, row: Row) -> int:
        """Return the number of test images that a row asks for."""
        return min(self.images, row.images or self.images)

    def only(self, rows: str | None = None, attacks: tuple[str, ...] | None = None, limit: int | None = None) -> Grid:
        """Return a part of the grid.

        Args:
            rows: comma-separated words: keep rows with at least one of them in their name, and with none of the words
                that begin with an exclamation mark, as in ``"resnet,vgg,!delta-25"``. If all words begin with one, all
                other rows are kept.
            attacks: keep these columns. Thresholds are still calibrated under all the grid's attacks.
            limit: at most this many images.

        Raises:
            ValueError: if nothing is left, or for an unknown attack.
        """
        grid = self
        if rows is not None:
            words = [current_name(word.strip()) for word in rows.split(",")]
            kept = tuple(row for row in self.rows if _matches(row.name, words))
            if not kept:
                raise ValueError(f"rows must match one of {', '.join(row.name for row in self.rows)}, got {rows!r}")
            grid = replace(grid, rows=kept)
        if attacks is not None:
            _check("attacks", attacks, ATTACKS)
            of_rows = tuple(
                replace(row, attacks=tuple(a for a in attacks if row.attacks is None or a in row.attacks))
                for row in grid.rows
            )
            grid = replace(grid, rows=of_rows)
        return grid if limit is None else replace(grid, images=min(check_count("limit", limit), grid.images))


def current_name(name: str) -> str:
    """Return a row's name, or a part of one, with the threats' names of version 0.1 replaced by the current ones."""
    for earlier, current in EARLIER_NAMES.items():
        name = name.replace(earlier, current)
    return name


def _matches(name: str, words: list[str]) -> bool:
    with_, without = ([w for w in words if w.startswith("!") == negated] for negated in (False, True))
    return any(w in name for w in with_ or [""]) and not any(w[1:] in name for w in without)


def _check(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    for value in values:
        check_choice(name, value, known)
