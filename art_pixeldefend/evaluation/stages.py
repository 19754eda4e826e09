"""The stages behind each cell: trained classifiers, attacked images, purified images, predictions; stored by key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
from art.defences.preprocessor import Preprocessor
from art.estimators.classification import PyTorchClassifier

from art_pixeldefend import classifiers
from art_pixeldefend.attacks import ATTACKS, unclipped
from art_pixeldefend.attacks.budget import clip_to_ball
from art_pixeldefend.attacks.through import backward_pass, purifiers_of
from art_pixeldefend.classifiers.layers import Network
from art_pixeldefend.classifiers.training import Recipe, seeded, shortened
from art_pixeldefend.datasets import Dataset
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Grid, Row
from art_pixeldefend.evaluation.preprocessors import CALIBRATED, Step, is_placeholder, placeholders, preprocessor
from art_pixeldefend.evaluation.store import Settings, Store, digest
from art_pixeldefend.evaluation.threat import BLIND
from art_pixeldefend.levels import UNIT, from_levels
from art_pixeldefend.models import zoo
from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.purifiers import Purifier

T = TypeVar("T")


class Stages:
    """Compute the stages of a grid's cells, or read them from the store. Images are float32 in [0, 1].

    Args:
        grid: the settings that everything follows from.
        data: the grid's data set.
        store: where results are kept.
        verbose: show a progress bar while a classifier is trained.

    Raises:
        ValueError: if the grid has more validation images than the data set reserves, or reports on those that choose
            a threshold.

    Example:
        >>> from art_pixeldefend import datasets
        >>> small = {"recipe": "digits", "steps": 2, "sizes": {"vgg": {"width": 2}}}
        >>> stages = Stages(Grid("digits", (Row("vgg"),), (40,), **small), datasets.load("digits"), Store("work"))
        >>> cell = Cell(Row("vgg"), "rand", 40)
        >>> stages.attacked(cell, 0, 10).shape
        (10, 1, 8, 8)
    """

    def __init__(self, grid: Grid, data: Dataset, store: Store, *, verbose: bool = False) -> None:
        self.grid, self.data, self.store, self.verbose = grid, data, store, verbose
        official, reserve = data.train_and_calibration(), data.reserve()
        rest = len(official.x) - grid.validation
        self.splits = {
            "train": (official.x[:rest], official.y[:rest]),
            "reserve": (reserve.x[: grid.validation], reserve.y[: grid.validation]),
            "test": (data.x_test, data.y_test),
        }
        self._check_reserve()
        self.failures: dict[str, str] = {}  # messages, by the digest of the settings that failed
        self._models = lru_cache(maxsize=2)(self._model)
        self.classifier = lru_cache(maxsize=4)(self._classifier)
        self.image_model = lru_cache(maxsize=None)(self._image_model)
        self.fingerprint = lru_cache(maxsize=None)(lambda name: self.image_model(name).fingerprint())

    def _check_reserve(self) -> None:
        """Check that thresholds are chosen on test images that the table does not report."""
        grid, reserved = self.grid, self.data.reserved
        calibrated = [row for row in grid.rows if self._calibrated_steps(row)]
        if calibrated and grid.validation > reserved:
            raise ValueError(
                f"validation must be at most {reserved}, the test images that {grid.dataset} reserves, "
                f"got {grid.validation}"
            )
        for row in calibrated:
            if self.count(row) > self.most_reported:
                raise ValueError(
                    f"images of {row.name} must be at most {self.most_reported}, as the last {reserved} test images "
                    f"choose its threshold, got {self.count(row)}"
                )

    @property
    def most_reported(self) -> int:
        """The number of test images that are not reserved."""
        return len(self.data.x_test) - self.data.reserved

    @cached_property
    def data_key(self) -> str:
        """A hash of the data: a changed file of the same name leads to new results."""
        arrays = (*self.data.train_and_calibration(), self.data.x_test, self.data.y_test)
        return digest({"arrays": [[str(a.dtype), a.shape, hashlib.sha256(a.tobytes()).hexdigest()] for a in arrays]})

    def _image_model(self, name: str) -> ImageModel:
        """Load one of the grid's models."""
        return zoo.load(self.grid.models[name])

    # Classifiers

    def training(self, row: Row) -> dict[str, Any]:
        """Return the settings that a row's classifier follows from."""
        grid = self.grid
        recipe = self.recipe(row)
        settings = {
            "dataset": self.data_key, "network": row.network, "sizes": dict(grid.sizes.get(row.network, {})),
            "training": row.training, "recipe": asdict(recipe), "validation": grid.validation, "seed": grid.seed,
        }  # fmt: skip
        settings |= {"smoothing": classifiers.SMOOTHING} if row.training == "label-smoothing" else {}
        if not row.adversarial:
            return settings
        return settings | {"delta": grid.delta_of(row), "ratio": classifiers.ADVERSARIAL[row.training][1]}

    def recipe(self, row: Row) -> Recipe:
        """Return the recipe of a row's classifier."""
        steps = self.grid.steps_of(row)
        return shortened(self.grid.recipe, steps) if steps else classifiers.RECIPES[self.grid.recipe]

    def classifiers(self) -> list[Row]:
        """Return a row without a defence for each classifier of the grid."""
        return list({digest(self.training(row)): row.classifier for row in self.grid.rows}.values())

    def trained(self, row: Row) -> bool:
        """Whether a row's classifier is stored."""
        return self.store.path("classifiers", self.training(row), ".safetensors").is_file()

    def model(self, row: Row) -> Network:
        """Return a row's network, trained now if it is not stored. Training that failed is not repeated."""
        return self._models(row.classifier)

    def _model(self, row: Row) -> Network:
        # Attacks need gradients in the images only; those in the parameters would take a third of the time.
        return self._once(
            self.training(row),
            f"no classifier {row.network}, {row.training}",
            lambda: self._load_or_train(row).requires_grad_(False),
        )

    def _once(self, settings: Settings, failure: str, compute: Callable[[], T]) -> T:
        """Return what ``compute`` returns, or raise the error that it raised before for these settings."""
        key = digest(settings)
        if key in self.failures:
            raise RuntimeError(self.failures[key])
        try:
            return compute()
        except Exception as error:
            self.failures[key] = f"{failure}: {error}"
            raise

    def _load_or_train(self, row: Row) -> Network:
        grid, data, settings = self.grid, self.data, self.training(row)
        path = self.store.path("classifiers", settings, ".safetensors")
        if not path.is_file():
            model = classifiers.build(
                row.network, data.image_shape, len(data.classes), seed=grid.seed, **grid.sizes.get(row.network, {})
            )
            delta = grid.delta_of(row) or grid.delta  # used in adversarial training only
            classifiers.train(
                model,
                *self.splits["train"],
                self.recipe(row),
                row.training,
                delta=delta,
                seed=grid.seed,
                checkpoint=path.with_suffix(".run"),
                verbose=self.verbose,
            )
            classifiers.save(path, model, settings)
        return classifiers.load(path)

    def _classifier(self, row: Row, defended: bool = False) -> PyTorchClassifier:
        """Return the row's classifier, alone or behind the row's defence."""
        return classifiers.as_art(self.model(row), self.defence(row) if defended else None)

    # Defences

    def steps(self, row: Row) -> list[Step]:
        """Return the row's defence as data, with calibrated thresholds filled in."""
        return [
            (path, {key: self.threshold(row, (path, arguments)) if value == CALIBRATED else value
                    for key, value in arguments.items()})
            for path, arguments in self._steps(row)
        ]  # fmt: skip

    def _steps(self, row: Row) -> Sequence[Step]:
        return () if row.defence == "none" else self.grid.defences[row.defence]

    def defence(self, row: Row) -> Preprocessor | None:
        """Return the row's defence as an ART preprocessor; if its random numbers are known, with the grid's seed."""
        defence = self.build(self.steps(row))
        if row.threat.seeds_known and isinstance(defence, Purifier):
            defence.set_params(seed=self.grid.seed)
        return defence

    def build(self, steps: Sequence[Step]) -> Preprocessor | None:
        """Return the preprocessor that steps describe, with the grid's models filled in."""
        return preprocessor(
            [
                (path, {key: self.image_model(value[1:-1]) if is_placeholder(value) else value
                        for key, value in arguments.items()})
                for path, arguments in steps
            ]
        )  # fmt: skip

    def threshold(self, row: Row, step: Step) -> float:
        """Return the calibrated argument of a step of the row's defence.

        It is chosen on reserved test images under the grid's attacks with the row's radii, and shared by rows of
        another threat. Calibration that failed is not repeated.
        """
        settings = self._threshold_key(row, step)
        if (kept := self.store.read("thresholds", settings)) is None:
            chosen = self._once(settings, f"no threshold {row.name}", lambda: self._calibrate(row, step))
            kept = {"threshold": chosen, "settings": settings}
            self.store.write("thresholds", settings, kept)
        return kept["threshold"]

    def _calibrate(self, row: Row, step: Step) -> float:
        path, arguments = step
        defence = self.build([(path, {key: value for key, value in arguments.items() if value != CALIBRATED})])
        calibrate = getattr(defence, "calibrate", None)
        if calibrate is None:
            raise ValueError(f"defence {path!r} has no method calibrate, which {CALIBRATED!r} asks for")
        undefended, (x, y) = row.classifier, self.splits["reserve"]
        attacked = {
            f"within {eps} levels": {
                attack: self.attacked(Cell(undefended, attack, eps), 0, len(x), "reserve")
                for attack in self.grid.attacks
            }
            for eps in self.grid.eps_of(row)
        } | {CLEAN: self.clean(0, len(x), "reserve")}
        with seeded(self.grid.seed):
            return calibrate(self.classifier(undefended), attacked, y)

    def _threshold_key(self, row: Row, step: Step) -> dict[str, Any]:
        return {
            "classifier": self.training(row), "defence": self._key([step]), "eps": list(self.grid.eps_of(row)),
            "images": ["reserve", len(self.splits["reserve"][1])],
            "attacks": [attack_key(attack) for attack in self.grid.attacks], "version": 2,
        }  # fmt: skip

    def calibrated(self, row: Row) -> bool:
        """Whether the thresholds of the row's defence are stored."""
        return all(self.store.read("thresholds", key) is not None for key in self._threshold_keys(row))

    def uncalibrated(self) -> list[Row]:
        """Return a row for each threshold that the grid needs and that is not stored."""
        missing = [row for row in self.grid.rows if not self.calibrated(row)]
        return list({digest({"thresholds": self._threshold_keys(row)}): row for row in missing}.values())

    def _threshold_keys(self, row: Row) -> list[dict[str, Any]]:
        return [self._threshold_key(row, step) for step in self._calibrated_steps(row)]

    def _calibrated_steps(self, row: Row) -> list[Step]:
        """Return the steps of the row's defence that are to be calibrated."""
        return [step for step in self._steps(row) if CALIBRATED in placeholders([step])]

    def _key(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Return the settings that a defence follows from: a retrained model of the same name leads to new results."""
        models = sorted(name[1:-1] for name in placeholders(steps) - {CALIBRATED})
        return {
            "steps": [[path, dict(arguments)] for path, arguments in steps],
            "models": {name: self.fingerprint(name) for name in models},
        }

    def _defence_key(self, row: Row) -> dict[str, Any] | None:
        steps = self.steps(row)
        return self._key(steps) if steps else None

    # Images

    def clean(self, start: int, count: int, split: str = "test") -> np.ndarray:
        """Return ``count`` images of a split from ``start``."""
        return from_levels(self.splits[split][0][start : start + count], UNIT)

    def attacked(self, cell: Cell, start: int, count: int, split: str = "test") -> np.ndarray:
        """Return the same images attacked: 8-bit images within the cell's radius."""
        x = self.clean(start, count, split)
        if cell.attack == CLEAN:
            return x
        raw = self.store.images(
            "attacked", self.attack_key(cell, start, count, split), lambda: self._attack(cell, x, start, split)
        )
        return clip_to_ball(raw, x, cell.eps, UNIT)

    def attack_key(self, cell: Cell, start: int, count: int, split: str = "test") -> dict[str, Any]:
        """Return the settings that attacked images follow from, and no others: rows and radii share images."""
        entry = ATTACKS[cell.attack] if cell.attack != CLEAN else None
        key: dict[str, Any] = {"dataset": self.data_key, "split": split, "start": start, "count": count}
        if entry is None:
            return key
        key |= {"attack": attack_key(cell.attack), "seed": self.grid.seed}
        key |= {"eps": cell.eps} if entry.uses_eps else {}
        if entry.sees_classifier:
            threat = cell.row.threat
            defence = self._defence_key(cell.row) if threat.sees != BLIND.sees else None
            key |= {"classifier": self.training(cell.row), "defence": defence}
            key |= {} if isinstance(threat.key, str) else {"threat": threat.key}
        return key

    def _attack(self, cell: Cell, x: np.ndarray, start: int, split: str) -> np.ndarray:
        entry, threat = ATTACKS[cell.attack], cell.row.threat
        through = threat.sees != BLIND.sees and cell.row.defence != "none" and entry.sees_classifier
        classifier = self.classifier(cell.row, defended=through)
        settings = threat.settings if entry.sees_classifier else {}
        attack = unclipped(cell.attack, classifier, cell.eps, batch_size=len(x), seed=self._seed(start), **settings)
        y = np.eye(len(self.data.classes), dtype=np.float32)[self.splits[split][1][start : start + len(x)]]
        gradient = backward_pass(purifiers_of(classifier), threat.gradient if through else None)
        with gradient, seeded(2 * self._seed(start) + 1):  # other draws than those of the defence afterwards
            raw = attack.generate(x, y=y if entry.true_labels else None)
        # The images of an attack without a radius are clipped when they are used: they serve all radii.
        return clip_to_ball(raw, x, cell.eps, UNIT) if entry.uses_eps else raw

    def _seed(self, start: int) -> int:
        """The seed of the chunk at ``start``, whichever process computes it."""
        return self.grid.seed * 1_000_003 + start

    def defended(self, cell: Cell, start: int, count: int) -> np.ndarray:
        """Return the cell's attacked images after its defence."""
        x, key = self.attacked(cell, start, count), self.defended_key(cell, start, count)
        if key["defence"] is None:
            return x

        def compute() -> np.ndarray:
            defence = self.defence(cell.row)
            assert defence is not None  # its key is not None
            with seeded(2 * self._seed(start)):
                return defence(x)[0]

        return self.store.images("defended", key, compute)

    def defended_key(self, cell: Cell, start: int, count: int) -> dict[str, Any]:
        """Return the settings that defended images follow from."""
        attacked = self.attack_key(cell, start, count)
        known = {"seeds_known": True} if cell.row.threat.seeds_known else {}
        return known | {
            "attacked": attacked, "eps": cell.eps, "defence": self._defence_key(cell.row), "seed": self.grid.seed
        }  # fmt: skip

    def right(self, cell: Cell, start: int, count: int) -> np.ndarray:
        """Return whether each of the cell's images is classified correctly, (count,)."""
        x, y = self.defended(cell, start, count), self.splits["test"][1][start : start + count]
        return self.classifier(cell.row).predict(x, batch_size=count).argmax(axis=1) == y

    def cell_key(self, cell: Cell) -> Settings:
        """Return all settings that a cell's number follows from."""
        return {
            "classifier": self.training(cell.row), "threat": cell.row.threat.key,
            "defence": self._defence_key(cell.row), "attack": attack_key(cell.attack), "eps": cell.eps,
            "images": self.count(cell.row), "chunk": self.grid.chunk, "seed": self.grid.seed,
        }  # fmt: skip

    def count(self, row: Row) -> int:
        """Return the number of test images that a row is measured on."""
        return min(self.grid.images_of(row), len(self.data.x_test))


def attack_key(name: str) -> list[Any]:
    """Return an attack's name and version."""
    return [name, None if name == CLEAN else ATTACKS[name].version]
