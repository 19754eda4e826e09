"""What a cell is made of: a trained classifier, attacked images, purified images, predictions; each computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
from art.defences.preprocessor import Preprocessor
from art.estimators.classification import PyTorchClassifier

from art_pixeldefend import classifiers
from art_pixeldefend.attacks import ATTACKS, unclipped
from art_pixeldefend.attacks.budget import clip_to_ball, from_levels
from art_pixeldefend.classifiers.layers import Network
from art_pixeldefend.classifiers.training import Recipe, shortened
from art_pixeldefend.datasets import Dataset
from art_pixeldefend.detectors import PixelDefendDetector
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Grid, Row
from art_pixeldefend.evaluation.preprocessors import Step, preprocessor, takes
from art_pixeldefend.evaluation.store import UNIT, Settings, Store, digest
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.zoo import as_model
from art_pixeldefend.purifiers import AdaptivePixelDefend

CALIBRATED = "calibrated"
T = TypeVar("T")


class Stages:
    """Images are float32 in [0, 1] here, on the 8-bit grid unless a defence left it.

    Args:
        grid: what everything follows from.
        data: the grid's data set.
        store: where results are kept.
        verbose: show a progress bar while a classifier is trained.

    Raises:
        ValueError: if the grid has more validation images than the data set reserves, or reports on those that choose
            a threshold.
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
        self.failures: dict[str, str] = {}  # what could not be made, by the digest of its settings
        self._models = lru_cache(maxsize=2)(self._model)
        self.classifier = lru_cache(maxsize=4)(self._classifier)

    def _check_reserve(self) -> None:
        """A threshold is chosen on test images that no model has seen, and that the table does not report."""
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
        """Tells data sets apart, by what is in them: a changed file of the same name makes new results."""
        arrays = (*self.data.train_and_calibration(), self.data.x_test, self.data.y_test)
        return digest({"arrays": [[str(a.dtype), a.shape, hashlib.sha256(a.tobytes()).hexdigest()] for a in arrays]})

    @cached_property
    def pixel_cnn(self) -> PixelCNNpp:
        """The density model, loaded when first needed, where ART puts classifiers."""
        return as_model(self.grid.pixel_cnn, PixelCNNpp, name="pixel_cnn")

    # Classifiers

    def training(self, row: Row) -> dict[str, Any]:
        """The settings of a row's classifier."""
        grid = self.grid
        recipe = self.recipe(row)
        settings = {
            "dataset": self.data_key, "network": row.network, "sizes": dict(grid.sizes.get(row.network, {})),
            "training": row.training, "recipe": asdict(recipe), "validation": grid.validation, "seed": grid.seed,
        }  # fmt: skip
        settings |= {"smoothing": classifiers.SMOOTHING} if row.training == "label-smoothing" else {}
        return settings | ({"delta": grid.delta_of(row), "ratio": classifiers.RATIO} if row.adversarial else {})

    def recipe(self, row: Row) -> Recipe:
        """How a row's classifier is trained."""
        steps = self.grid.steps_of(row)
        return shortened(self.grid.recipe, steps) if steps else classifiers.RECIPES[self.grid.recipe]

    def classifiers(self) -> list[Row]:
        """The grid's classifiers, each once, with nothing in front of them."""
        return list({digest(self.training(row)): row.classifier for row in self.grid.rows}.values())

    def trained(self, row: Row) -> bool:
        """Whether a row's classifier is there."""
        return self.store.path("classifiers", self.training(row), ".safetensors").is_file()

    def model(self, row: Row) -> Network:
        """A row's trained network, trained now if it is not there; but not twice if that fails."""
        return self._models(row.classifier)

    def _model(self, row: Row) -> Network:
        # Attacks need gradients in the images only; in the parameters they would cost a third of the time.
        return self._once(
            self.training(row),
            f"no classifier {row.network}, {row.training}",
            lambda: self._load_or_train(row).requires_grad_(False),
        )

    def _once(self, settings: Settings, failure: str, compute: Callable[[], T]) -> T:
        """What ``compute`` gives; where it has failed before for these settings, that failure again."""
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
            delta = grid.delta_of(row) or grid.delta  # training that is not adversarial leaves it unread
            classifiers.train(
                model,
                *self.splits["train"],
                self.recipe(row),
                row.training,
                delta=delta,
                seed=grid.seed,
                verbose=self.verbose,
            )
            classifiers.save(path, model, settings)
        return classifiers.load(path)[0]

    def _classifier(self, row: Row, through: bool) -> PyTorchClassifier:
        """What is attacked: the row's network, bare or behind the row's defence."""
        defence = self.defence(row) if through else None
        return classifiers.as_art(self.model(row), defence)

    # Defences

    def steps(self, row: Row) -> list[Step]:
        """The row's defence as data, a threshold that is to be calibrated replaced by its value."""
        steps = () if row.defence == "none" else self.grid.defences[row.defence]
        return [
            (path, dict(arguments) | ({"threshold": self.threshold(row, path)} if _calibrated(arguments) else {}))
            for path, arguments in steps
        ]

    def defence(self, row: Row) -> Preprocessor | None:
        """The row's defence as an ART preprocessor."""
        return self.build(self.steps(row))

    def threshold(self, row: Row, path: str) -> float:
        """Bits per dimension, chosen on reserved test images under the grid's attacks with the row's radii; kept.

        A threshold is the model's and the classifier's, so rows of another threat share it. Where choosing it fails, it
        is not tried twice.
        """
        settings = self._threshold_key(row, path)
        if (kept := self.store.read("thresholds", settings)) is None:
            chosen = self._once(settings, f"no threshold {row.name}", lambda: self._calibrate(row, path))
            kept = {"threshold": chosen, "settings": settings}
            self.store.write("thresholds", settings, kept)
        return kept["threshold"]

    def _calibrate(self, row: Row, path: str) -> float:
        bare, (x, y) = row.classifier, self.splits["reserve"]
        attacked = {
            f"{attack} {eps}": self.attacked(Cell(bare, attack, eps), 0, len(x), "reserve")
            for attack in self.grid.attacks
            for eps in self.grid.eps_of(row)
        } | {CLEAN: self.clean(0, len(x), "reserve")}
        arguments = dict(dict(self.grid.defences[row.defence])[path])
        defence = self.build([(path, arguments | {"threshold": 0.0})])
        if not isinstance(defence, AdaptivePixelDefend):
            raise ValueError(f"defence {path!r} has no threshold to calibrate")
        return defence.calibrate(self.classifier(bare, False), attacked, y)

    def _threshold_key(self, row: Row, path: str) -> dict[str, Any]:
        return {
            "classifier": self.training(row), "pixel_cnn": self.pixel_cnn_key, "defence": path,
            "images": ["reserve", len(self.splits["reserve"][1])],
            "arguments": dict(dict(self.grid.defences[row.defence])[path]), "eps": list(self.grid.eps_of(row)),
            "attacks": [attack_key(attack) for attack in self.grid.attacks],
        }  # fmt: skip

    def calibrated(self, row: Row) -> bool:
        """Whether the thresholds that the row's defence needs are there."""
        return all(self.store.read("thresholds", key) is not None for key in self._threshold_keys(row))

    def uncalibrated(self) -> list[Row]:
        """A row for each threshold that the grid needs and that is not there."""
        missing = [row for row in self.grid.rows if not self.calibrated(row)]
        return list({digest({"thresholds": self._threshold_keys(row)}): row for row in missing}.values())

    def _threshold_keys(self, row: Row) -> list[dict[str, Any]]:
        return [self._threshold_key(row, path) for path in self._calibrated_steps(row)]

    def _calibrated_steps(self, row: Row) -> list[str]:
        """The import paths of the row's defences whose threshold is to be calibrated."""
        steps = () if row.defence == "none" else self.grid.defences[row.defence]
        return [path for path, arguments in steps if _calibrated(arguments)]

    def build(self, steps: Sequence[Step]) -> Preprocessor | None:
        """The preprocessor that steps describe, with clip values and density model where it takes them."""
        common = {"pixel_cnn": self.pixel_cnn} if _has_density_model(steps) else {}
        return preprocessor(steps, clip_values=UNIT, batch_size=self.grid.chunk, **common)

    @cached_property
    def pixel_cnn_key(self) -> str:
        """Tells density models apart, by what is in them: a retrained one under the same name makes new results."""
        return self.pixel_cnn.fingerprint()

    def _defence_key(self, row: Row) -> dict[str, Any] | None:
        steps = self.steps(row)
        if not steps:
            return None
        named = {"pixel_cnn": self.pixel_cnn_key} if _has_density_model(steps) else {}
        return {"steps": [[path, dict(arguments)] for path, arguments in steps]} | named

    # Images

    def clean(self, start: int, count: int, split: str = "test") -> np.ndarray:
        """``count`` images of a split from ``start``."""
        return from_levels(self.splits[split][0][start : start + count], UNIT)

    def attacked(self, cell: Cell, start: int, count: int, split: str = "test") -> np.ndarray:
        """Those images attacked as the cell says: 8-bit, within the ball."""
        x = self.clean(start, count, split)
        if cell.attack == CLEAN:
            return x
        raw = self.store.images(
            "attacked", self.attack_key(cell, start, count, split), lambda: self._attack(cell, x, start, split)
        )
        return clip_to_ball(raw, x, cell.eps, UNIT)

    def attack_key(self, cell: Cell, start: int, count: int, split: str = "test") -> dict[str, Any]:
        """The settings that attacked images follow from: no more, so that rows and radii share what they can."""
        entry = ATTACKS[cell.attack] if cell.attack != CLEAN else None
        key: dict[str, Any] = {"dataset": self.data_key, "split": split, "start": start, "count": count}
        if entry is None:
            return key
        key |= {"attack": attack_key(cell.attack), "seed": self.grid.seed}
        key |= {"eps": cell.eps} if entry.uses_eps else {}
        if entry.sees_classifier:
            through = self._defence_key(cell.row) if cell.row.threat == "through" else None
            key |= {"classifier": self.training(cell.row), "through": through}
        return key

    def _attack(self, cell: Cell, x: np.ndarray, start: int, split: str) -> np.ndarray:
        entry, through = ATTACKS[cell.attack], cell.row.threat == "through" and cell.row.defence != "none"
        classifier = self.classifier(cell.row, through and entry.sees_classifier)
        # Every chunk has noise of its own, whichever process has it.
        seed = self.grid.seed * 1_000_003 + start
        attack = unclipped(cell.attack, classifier, cell.eps, batch_size=len(x), seed=seed)
        y = self.splits[split][1][start : start + len(x)]
        raw = attack.generate(x, y=np.eye(len(self.data.classes), dtype=np.float32)[y] if entry.true_labels else None)
        # An attack that knows no radius is clipped to each when it is used; here it would only fit one.
        return clip_to_ball(raw, x, cell.eps, UNIT) if entry.uses_eps else raw

    def defended(self, cell: Cell, start: int, count: int) -> np.ndarray:
        """The cell's attacked images after its defence."""
        x, key = self.attacked(cell, start, count), self._defended_key(cell, start, count)
        if key["defence"] is None:
            return x

        def compute() -> np.ndarray:
            defence = self.defence(cell.row)
            assert defence is not None  # its key is not None
            return defence(x)[0]

        return self.store.images("defended", key, compute)

    def _defended_key(self, cell: Cell, start: int, count: int) -> dict[str, Any]:
        attacked = self.attack_key(cell, start, count)
        return {"attacked": attacked, "eps": cell.eps, "defence": self._defence_key(cell.row)}

    def scores(self, cell: Cell, start: int, count: int) -> np.ndarray:
        """Log-likelihoods (count,) in nats, under the density model, of the cell's images after its defence; kept."""
        key = {"images": self._defended_key(cell, start, count), "pixel_cnn": self.pixel_cnn_key}
        return self._scores(key, lambda: self.defended(cell, start, count))

    def reference_scores(self, count: int) -> np.ndarray:
        """Log-likelihoods of the first ``count`` images that the grid's figures compare with, or of all; kept."""
        split = self.grid.reference
        if split == "calibration" and split not in self.splits:
            self.splits[split] = self.data.calibration(self.pixel_cnn)
        x = self.splits["train" if split == "training" else split][0][:count]
        key = {"images": [self.data_key, split, len(x)], "pixel_cnn": self.pixel_cnn_key}
        return self._scores(key, lambda: from_levels(x, UNIT))

    def _scores(self, key: Settings, images: Callable[[], np.ndarray]) -> np.ndarray:
        if (kept := self.store.read("scores", key)) is None:
            detector = PixelDefendDetector(self.pixel_cnn, UNIT, batch_size=self.grid.chunk)
            kept = {"log_likelihoods": detector.score(images()).tolist()}
            self.store.write("scores", key, kept)
        return np.array(kept["log_likelihoods"])

    def right(self, cell: Cell, start: int, count: int) -> np.ndarray:
        """Whether each of the cell's images is classified rightly, (count,)."""
        x, y = self.defended(cell, start, count), self.splits["test"][1][start : start + count]
        return self.classifier(cell.row, False).predict(x, batch_size=count).argmax(axis=1) == y

    def cell_key(self, cell: Cell) -> Settings:
        """All settings that a cell's number follows from."""
        return {
            "classifier": self.training(cell.row), "threat": cell.row.threat, "defence": self._defence_key(cell.row),
            "attack": attack_key(cell.attack), "eps": cell.eps, "images": self.count(cell.row),
            "chunk": self.grid.chunk, "seed": self.grid.seed,
        }  # fmt: skip

    def count(self, row: Row) -> int:
        """How many test images a row is measured on: no more than there are."""
        return min(self.grid.images_of(row), len(self.data.x_test))


def attack_key(name: str) -> list[Any]:
    """Tells an attack, and its versions, apart."""
    return [name, None if name == CLEAN else ATTACKS[name].version]


def _has_density_model(steps: Sequence[Step]) -> bool:
    return any("pixel_cnn" in takes(path) for path, _ in steps)


def _calibrated(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("threshold") == CALIBRATED
