"""The paper's tables as data: rows, columns, and what each name in them means."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from art_pixeldefend.attacks import ATTACKS, PAPER
from art_pixeldefend.classifiers import NETWORKS, RECIPES, TECHNIQUES
from art_pixeldefend.evaluation.preprocessors import Step
from art_pixeldefend.validation import check_count, check_eps

THREATS = ("bare", "through")
REFERENCES = ("calibration", "training")
CLEAN = "clean"


@dataclass(frozen=True)
class Row:
    """A classifier behind a defence, and what the attacker sees of them.

    Args:
        network, training: names of ``classifiers.NETWORKS`` and ``classifiers.TECHNIQUES``.
        defence: a name of the grid's defences.
        threat: ``"bare"``: the attacks see the classifier only (the paper's PixelDefend rows); ``"through"``: they see
            classifier and defence (its feature-squeezing rows), with the identity as the gradient of what has none.
        attacks: the columns to run, if not the grid's.
        images: how many, if not the grid's.
        delta: deviation of adversarial training's radius, in levels, if not the grid's.
        eps: radii of attack to run, in levels, if not the grid's.
        steps: of the classifier's training, if not the grid's.
    """

    network: str = "resnet"
    training: str = "normal"
    defence: str = "none"
    threat: str = "bare"
    attacks: tuple[str, ...] | None = None
    images: int | None = None
    delta: float | None = None
    eps: tuple[int, ...] | None = None
    steps: int | None = None

    @property
    def name(self) -> str:
        """For ``--rows`` and for progress: network/training/defence/threat; the training with its delta, if set."""
        delta = "" if self.delta is None else f"-delta-{self.delta:g}"
        return f"{self.network}/{self.training}{delta}/{self.defence}/{self.threat}"

    @property
    def adversarial(self) -> bool:
        """Whether its classifier saw attacked images in training, so that there is a delta."""
        return self.training.startswith("adversarial")

    @property
    def classifier(self) -> Row:
        """The same classifier with nothing in front of it."""
        return Row(self.network, self.training, delta=self.delta, steps=self.steps)


@dataclass(frozen=True)
class Cell:
    """One number of the table: a row under an attack of a radius in levels (0 for clean images)."""

    row: Row
    attack: str
    eps: int

    @property
    def name(self) -> str:
        """The row's name and the column's."""
        return f"{self.row.name} {self.attack}" + (f" {self.eps}" if self.eps else "")


@dataclass(frozen=True)
class Grid:
    """Everything that determines a table.

    Args:
        dataset: name or path, as ``datasets.load`` takes it.
        rows: of the table.
        eps: radii of attack, in levels.
        attacks: names of ``attacks.ATTACKS``.
        defences: preprocessors by name, each a tuple of (import path, arguments); ``pixel_cnn`` is filled in where a
            class takes it, and a ``threshold`` of "calibrated" is chosen on validation images.
        pixel_cnn: the density model: a bundled name or a path.
        recipe: of the classifiers, a name of ``classifiers.RECIPES``.
        steps: of the recipe, if not its own.
        sizes: of the networks, by name, if not the paper's.
        delta: of adversarial training, in levels; a row may have its own.
        images: the first so many test images.
        validation: how many test images, of those that the data set reserves, choose a threshold; as many training
            images, the last, train no classifier.
        chunk: images a unit of work: the least that is lost when interrupted, and what processes share out.
        seed: of everything random.
        reference: what the figures' p-values and ROC curves compare with: ``"calibration"`` images, which the density
            model has not seen, or its ``"training"`` images, as in the paper.

    Raises:
        ValueError: naming what is not as described.
    """

    dataset: str
    rows: tuple[Row, ...]
    eps: tuple[int, ...]
    attacks: tuple[str, ...] = PAPER
    defences: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    pixel_cnn: str = ""
    recipe: str = "quick"
    steps: int | None = None
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    delta: float = 8
    images: int = 1000
    validation: int = 100
    chunk: int = 50
    seed: int = 0
    reference: str = "calibration"

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("validation", 0), ("chunk", 1)):
            check_count(name, getattr(self, name), least)
        for eps in self.eps:
            check_eps("eps", eps)
        _check("attacks", self.attacks, ATTACKS)
        _check("recipe", (self.recipe,), RECIPES)
        _check("reference", (self.reference,), REFERENCES)
        for row in self.rows:
            _check("network", (row.network,), NETWORKS)
            _check("training", (row.training,), TECHNIQUES)
            _check("defence", (row.defence,), {"none": (), **self.defences})
            _check("threat", (row.threat,), THREATS)
            _check("attacks", row.attacks or (), ATTACKS)
            if row.delta is not None and not (row.adversarial and row.delta > 0):
                raise ValueError(
                    f"delta must be positive, and of an adversarial training, got {row.delta!r} in {row.name}"
                )
            for eps in row.eps or ():
                if eps not in self.eps:
                    raise ValueError(f"eps of {row.name} must be of the grid's {self.eps}, got {eps!r}")
        self._check_distinct()

    def _check_distinct(self) -> None:
        """A table has one line for each of these: two rows that differ in nothing else would show one's numbers."""
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
        """Every number, clean first in each row."""
        for row in self.rows:
            yield Cell(row, CLEAN, 0)
            for attack in self.attacks_of(row):
                for eps in self.eps_of(row):
                    yield Cell(row, attack, eps)

    def attacks_of(self, row: Row) -> tuple[str, ...]:
        """The columns of a row, clean images aside."""
        return self.attacks if row.attacks is None else row.attacks

    def eps_of(self, row: Row) -> tuple[int, ...]:
        """The radii of attack of a row, in levels."""
        return self.eps if row.eps is None else row.eps

    def delta_of(self, row: Row) -> float | None:
        """The delta that a row's classifier was trained with; None for one that was not trained adversarially."""
        return None if not row.adversarial else self.delta if row.delta is None else row.delta

    def steps_of(self, row: Row) -> int | None:
        """The training steps of a row's classifier; None for as many as the recipe has."""
        return self.steps if row.steps is None else row.steps

    def images_of(self, row: Row) -> int:
        """How many test images a row is measured on."""
        return min(self.images, row.images or self.images)

    def only(self, rows: str | None = None, attacks: tuple[str, ...] | None = None, limit: int | None = None) -> Grid:
        """A smaller grid.

        Args:
            rows: keep those with any of these comma-separated words in their name, and with none of the words that
                begin with an exclamation mark: ``"resnet,vgg,!delta-25"``. Without a word of the first kind all are
                kept that have none of the second.
            attacks: keep these columns.
            limit: at most this many images.

        Raises:
            ValueError: if nothing is left, or for an unknown attack.
        """
        grid = self
        if rows is not None:
            words = [word.strip() for word in rows.split(",")]
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
            grid = replace(grid, rows=of_rows)  # thresholds are still chosen under all the grid's attacks
        return grid if limit is None else replace(grid, images=min(check_count("limit", limit), grid.images))


def _matches(name: str, words: list[str]) -> bool:
    with_, without = ([w for w in words if w.startswith("!") == negated] for negated in (False, True))
    return any(w in name for w in with_ or [""]) and not any(w[1:] in name for w in without)


def _check(name: str, values: tuple[str, ...], known: Any) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}, got {value!r}")


# The paper's tables


ART_PIXELDEFEND = "art_pixeldefend.evaluation.paper.art_pixel_defend.ArtPixelDefend"


def defences(eps: int, bit_depth: int) -> dict[str, tuple[Step, ...]]:
    """The paper's: PixelDefend within ``eps`` levels, colours squeezed to ``bit_depth`` bits."""
    return {
        "feature-squeezing": (
            ("art.defences.preprocessor.FeatureSqueezing", {"bit_depth": bit_depth}),
            ("art.defences.preprocessor.SpatialSmoothing", {"window_size": 2, "channels_first": True}),
        ),
        "pixeldefend": (("art_pixeldefend.purifiers.PixelDefend", {"eps": eps}),),
        "art-pixeldefend": ((ART_PIXELDEFEND, {"eps": eps}),),
        "adaptive-pixeldefend": (
            ("art_pixeldefend.purifiers.AdaptivePixelDefend", {"eps": eps, "threshold": "calibrated"}),
        ),
    }


PAPER_ROWS = (
    Row("resnet", "normal"),
    Row("vgg", "normal"),
    Row("resnet", "adversarial-fgsm"),
    Row("resnet", "adversarial-bim"),
    Row("resnet", "label-smoothing"),
    Row("resnet", "normal", "feature-squeezing", "through"),
    Row("resnet", "adversarial-fgsm", "feature-squeezing", "through"),
    Row("resnet", "normal", "pixeldefend"),
    Row("vgg", "normal", "pixeldefend"),
    Row("resnet", "adversarial-fgsm", "pixeldefend"),
    Row("resnet", "adversarial-fgsm", "adaptive-pixeldefend"),
)
# What the paper does not have: every defence under the other threat. PixelDefend runs at every attack step here, so
# these rows have fewer images, and leave out CW, which takes hundreds of steps.
SHORT = ("rand", "fgsm", "bim", "deepfool")
CHEAP = ("rand", "fgsm", "bim")  # ART's class weighs all 256 levels of every sub-pixel
OTHER_ROWS = (
    Row("resnet", "normal", "feature-squeezing", "bare"),
    Row("resnet", "adversarial-fgsm", "feature-squeezing", "bare"),
    Row("resnet", "normal", "art-pixeldefend", "bare", CHEAP, 100),
    Row("resnet", "normal", "art-pixeldefend", "through", CHEAP, 100),
    Row("resnet", "normal", "pixeldefend", "through", SHORT, 250),
    Row("vgg", "normal", "pixeldefend", "through", SHORT, 250),
    Row("resnet", "adversarial-fgsm", "pixeldefend", "through", SHORT, 250),
    Row("resnet", "adversarial-fgsm", "adaptive-pixeldefend", "through", SHORT, 250),
)


def per_radius(rows: Iterable[Row], radii: tuple[int, ...]) -> tuple[Row, ...]:
    """Adversarial rows once for each radius, their classifier trained with that as delta (the paper's Table 1)."""
    return tuple(
        made
        for row in rows
        for made in ([replace(row, delta=eps, eps=(eps,)) for eps in radii] if row.adversarial else [row])
    )


GRIDS = {
    "fashion-mnist": Grid(
        "fashion-mnist",
        per_radius(PAPER_ROWS + OTHER_ROWS, (8, 25)),
        (8, 25),
        defences=defences(32, 3),
        pixel_cnn="fashion-mnist-40x5",
        validation=500,
        chunk=125,
    ),
    "cifar-10": Grid("cifar-10", PAPER_ROWS + OTHER_ROWS, (2, 8, 16), defences=defences(16, 5), pixel_cnn="cifar-10"),
    # Embedded data, minutes: proves the whole path. A digit has 17 grey values, 16 levels apart, hence the radii.
    "digits": Grid(
        "digits",
        PAPER_ROWS + tuple(replace(row, images=20) for row in OTHER_ROWS),
        (40,),
        defences=defences(56, 3),
        pixel_cnn="digits",
        recipe="digits",
        steps=150,
        sizes={"resnet": {"units": 1}, "vgg": {"width": 2}},
        delta=20,
        images=60,
        validation=40,
        chunk=20,
    ),
}


PAPER_DELTAS = {("fashion-mnist", 25): 25}  # the others: 8


@cache
def paper_accuracies() -> Mapping[tuple[str, str, str, str, str, int], float]:
    """The paper's percentages by (data set, network, training, defence, attack, eps)."""
    with (Path(__file__).parent / "paper" / "tables.csv").open(newline="") as file:
        return {_key(line): float(line["accuracy_percent"]) for line in csv.DictReader(file)}


def _key(line: Mapping[str, str]) -> tuple[str, str, str, str, str, int]:
    return (
        line["dataset"], line["network"], line["training"], line["defence"], line["attack"], int(line["eps_attack"])
    )  # fmt: skip


def paper_accuracy(grid: Grid, row: Row, attack: str, eps: int) -> float | None:
    """The paper's percentage, or None where it has none.

    It attacks squeezed classifiers through, the others bare. It trains adversarially with delta 8, but for attacks
    within 25 levels with delta 25.
    """
    if row.adversarial and grid.delta_of(row) != PAPER_DELTAS.get((grid.dataset, eps), 8):
        return None
    if row.threat != ("through" if row.defence == "feature-squeezing" else "bare"):
        return None
    return paper_accuracies().get((grid.dataset, row.network, row.training, row.defence, attack, eps))
