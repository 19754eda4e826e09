"""The paper's tables as data: rows, columns, and what each name in them means."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from art_pixeldefend.attacks import ATTACKS, PAPER
from art_pixeldefend.classifiers import NETWORKS, RECIPES, TECHNIQUES
from art_pixeldefend.evaluation.preprocessors import Step
from art_pixeldefend.validation import check_count, check_eps

THREATS = ("bare", "through")
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
    """

    network: str = "resnet"
    training: str = "normal"
    defence: str = "none"
    threat: str = "bare"
    attacks: tuple[str, ...] | None = None
    images: int | None = None

    @property
    def name(self) -> str:
        """For ``--rows`` and for progress: network/training/defence/threat."""
        return f"{self.network}/{self.training}/{self.defence}/{self.threat}"


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
        delta: of adversarial training, in levels.
        images: the first so many test images.
        validation: the last so many training images choose the threshold, and train no classifier.
        chunk: images a unit of work: the least that is lost when interrupted, and what processes share out.
        seed: of everything random.

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

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("validation", 0), ("chunk", 1)):
            check_count(name, getattr(self, name), least)
        for eps in self.eps:
            check_eps("eps", eps)
        _check("attacks", self.attacks, ATTACKS)
        _check("recipe", (self.recipe,), RECIPES)
        for row in self.rows:
            _check("network", (row.network,), NETWORKS)
            _check("training", (row.training,), TECHNIQUES)
            _check("defence", (row.defence,), {"none": (), **self.defences})
            _check("threat", (row.threat,), THREATS)
            _check("attacks", row.attacks or (), ATTACKS)

    def cells(self) -> Iterator[Cell]:
        """Every number, clean first in each row."""
        for row in self.rows:
            yield Cell(row, CLEAN, 0)
            for attack in self.attacks_of(row):
                for eps in self.eps:
                    yield Cell(row, attack, eps)

    def attacks_of(self, row: Row) -> tuple[str, ...]:
        """The columns of a row, clean images aside."""
        return self.attacks if row.attacks is None else row.attacks

    def images_of(self, row: Row) -> int:
        """How many test images a row is measured on."""
        return min(self.images, row.images or self.images)

    def only(self, rows: str | None = None, attacks: tuple[str, ...] | None = None, limit: int | None = None) -> Grid:
        """A smaller grid.

        Args:
            rows: keep those with any of these comma-separated words in their name.
            attacks: keep these columns.
            limit: at most this many images.

        Raises:
            ValueError: if nothing is left, or for an unknown attack.
        """
        grid = self
        if rows is not None:
            words = [word.strip() for word in rows.split(",")]
            kept = tuple(row for row in self.rows if any(word in row.name for word in words))
            if not kept:
                raise ValueError(f"rows must match one of {', '.join(row.name for row in self.rows)}, got {rows!r}")
            grid = replace(grid, rows=kept)
        if attacks is not None:
            _check("attacks", attacks, ATTACKS)
            of_rows = tuple(
                replace(row, attacks=tuple(a for a in attacks if row.attacks is None or a in row.attacks))
                for row in grid.rows
            )
            grid = replace(grid, attacks=attacks, rows=of_rows)
        return grid if limit is None else replace(grid, images=min(check_count("limit", limit), grid.images))


def _check(name: str, values: tuple[str, ...], known: Any) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}, got {value!r}")


# The paper's tables


def defences(eps: int, bit_depth: int) -> dict[str, tuple[Step, ...]]:
    """The paper's: PixelDefend within ``eps`` levels, colours squeezed to ``bit_depth`` bits."""
    return {
        "feature-squeezing": (
            ("art.defences.preprocessor.FeatureSqueezing", {"bit_depth": bit_depth}),
            ("art.defences.preprocessor.SpatialSmoothing", {"window_size": 2, "channels_first": True}),
        ),
        "pixeldefend": (("art_pixeldefend.defences.PixelDefend", {"eps": eps}),),
        "adaptive-pixeldefend": (
            ("art_pixeldefend.defences.AdaptivePixelDefend", {"eps": eps, "threshold": "calibrated"}),
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
# these rows leave the long attacks out.
CHEAP = ("rand", "fgsm", "bim")
OTHER_ROWS = (
    Row("resnet", "normal", "feature-squeezing", "bare"),
    Row("resnet", "adversarial-fgsm", "feature-squeezing", "bare"),
    Row("resnet", "normal", "pixeldefend", "through", CHEAP, 100),
    Row("vgg", "normal", "pixeldefend", "through", CHEAP, 100),
    Row("resnet", "adversarial-fgsm", "pixeldefend", "through", CHEAP, 100),
    Row("resnet", "adversarial-fgsm", "adaptive-pixeldefend", "through", CHEAP, 100),
)

GRIDS = {
    "fashion-mnist": Grid(
        "fashion-mnist", PAPER_ROWS + OTHER_ROWS, (8, 25), defences=defences(32, 3), pixel_cnn="fashion-mnist"
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


@cache
def paper_accuracies() -> Mapping[tuple[str, str, str, str, str, int], float]:
    """The paper's percentages by (data set, network, training, defence, attack, eps)."""
    with (Path(__file__).parent / "paper.csv").open(newline="") as file:
        return {_key(line): float(line["accuracy_percent"]) for line in csv.DictReader(file)}


def _key(line: Mapping[str, str]) -> tuple[str, str, str, str, str, int]:
    return (
        line["dataset"], line["network"], line["training"], line["defence"], line["attack"], int(line["eps_attack"])
    )  # fmt: skip


def paper_accuracy(dataset: str, row: Row, attack: str, eps: int) -> float | None:
    """The paper's percentage, or None where it has none: it attacks squeezed classifiers through, the others bare."""
    if row.threat != ("through" if row.defence == "feature-squeezing" else "bare"):
        return None
    return paper_accuracies().get((dataset, row.network, row.training, row.defence, attack, eps))
