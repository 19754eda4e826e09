"""Measure how density model, radius, threshold, classifier and attack change the paper's tables.

    python benchmarks/causes.py --work FOLDER --density-model FILE --density-model FILE
    python benchmarks/causes.py --dataset cifar-10 --work FOLDER --density-model FILE --part density_models

``FOLDER`` is the one of ``paper_table.py``. Pass the same ``--shorter``, ``--chunk`` and ``--pixel-cnn`` as to that
script; otherwise classifiers and images are computed again. ``--density-model`` adds models, or checkpoints, from
``art-pixeldefend train``; ``--part`` selects parts. Each part of the output changes one thing:

- ``density_models``: the attacked images purified by each model, with the model's bits per dimension;
- ``eps_defend``: the attacked images purified within other radii;
- ``thresholds``: for the classifiers behind Adaptive PixelDefend, the shares of attacked images that are classified
  correctly as they are, purified, and in at least one of these ways, which no threshold can exceed;
- ``classifiers``: images attacked and purified for one classifier, classified by the others;
- ``ascent``: images under BIM purified by ascent of the likelihood instead of greedy decoding, in the same ball;
- ``recipes``: the VGG-16 of the table trained for other numbers of steps;
- ``sigma``: the score purifier with other noise on the images that choose thresholds, under blind attacks;
- ``attacks``: the number of images that DeepFool and CW fool before they are clipped, and their perturbations; BIM with
  four times its steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from published import RESULTS, Chunk, DataDir, PixelCnn, Shorter, facts_of_run, mcnemar, table_grid

from art_pixeldefend import PixelCNNpp, classifiers, datasets, greedy_decode
from art_pixeldefend.attacks import ATTACKS, make_attack
from art_pixeldefend.attacks.budget import bim_steps, level
from art_pixeldefend.evaluation.grid import Cell, Row
from art_pixeldefend.evaluation.paper.ascent import ascend_together
from art_pixeldefend.evaluation.paper.drawing import drawn_row
from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL, score_purifier
from art_pixeldefend.evaluation.paper.likelihoods import density_model as density_model_of
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import title
from art_pixeldefend.evaluation.threat import BLIND
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import TOP, UNIT, from_levels, to_levels
from art_pixeldefend.models.training import as_start

OTHERS = (0.5, 0.75, 1.25, 1.5, 2)  # radii of the defence, as multiples of the table's
STRONG = ("fgsm", "bim")
SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
OTHER_STEPS = (2500,)  # of VGG-16's training
ADAPTIVE = "adaptive-pixeldefend"


class Ablations:
    """Measurements that each change one thing, as dictionaries of percentages.

    Args:
        stages: of the grid behind the table.
        images: the first so many test images.
        others: density models besides the table's, by name.
    """

    def __init__(self, stages: Stages, images: int, others: dict[str, PixelCNNpp]) -> None:
        self.stages, self.images, self.others = stages, images, others
        self.row = drawn_row(stages.grid) or stages.grid.rows[0]
        self.eps = stages.grid.defences["pixeldefend"][0][1]["eps"]
        self.y = stages.data.y_test[:images]

    def attacked(self, row: Row, attack: str, eps: int) -> np.ndarray:
        """A cell's attacked images, from the store."""
        chunk, cell = self.stages.grid.chunk, Cell(row, attack, eps)
        starts = range(0, self.images, chunk)
        return np.concatenate([self.stages.attacked(cell, s, min(chunk, self.images - s)) for s in starts])

    def right(self, row: Row, x: np.ndarray) -> np.ndarray:
        """Whether the row's classifier is right about each image."""
        return self.stages.classifier(row.classifier).predict(x, batch_size=250).argmax(axis=1) == self.y

    def purified(self, x: np.ndarray, pixel_cnn: PixelCNNpp | None = None, eps: int | None = None) -> np.ndarray:
        """Images after PixelDefend."""
        model, radius = pixel_cnn or density_model_of(self.stages), self.eps if eps is None else eps
        return from_levels(greedy_decode(model, to_levels(x, UNIT), radius), UNIT)

    @cached_property
    def strong(self) -> dict[str, np.ndarray]:
        """The images of the PixelDefend row under the attacks that lower its accuracy most."""
        return {f"{a} {eps}": self.attacked(self.row, a, eps) for a in STRONG for eps in self.stages.grid.eps}

    def under(self, purify: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """Accuracy on clean images and under each strong attack with the given purifier."""
        images = {"clean": self.stages.clean(0, self.images)} | self.strong
        return {name: percent(self.right(self.row, purify(x))) for name, x in images.items()}

    def density_models(self) -> dict[str, Any]:
        """Accuracy by density model: the table's, and others."""
        models = {Path(self.stages.grid.models[DENSITY_MODEL]).name: density_model_of(self.stages)} | self.others
        clean = to_levels(self.stages.clean(0, self.images), UNIT)
        return {
            name: {"bits_per_dim": float(model.bits_per_dim(clean).mean())}
            | self.under(lambda x, model=model: self.purified(x, model))
            for name, model in models.items()
        }

    def eps_defend(self) -> dict[str, Any]:
        """Accuracy by the radius of the defence."""
        radii = [self.eps, *(int(self.eps * factor) for factor in OTHERS)]
        return {str(eps): self.under(lambda x, eps=eps: self.purified(x, eps=eps)) for eps in radii}

    def thresholds(self) -> dict[str, Any]:
        """Bounds on what a threshold can gain, for each classifier behind Adaptive PixelDefend."""
        found: dict[str, Any] = {}
        for row in (row for row in self.stages.grid.rows if row.defence == ADAPTIVE and row.threat == BLIND):
            for attack in self.stages.grid.attacks:
                for eps in self.stages.grid.eps_of(row):
                    x = self.attacked(row.classifier, attack, eps)
                    alone, purified = self.right(row, x), self.right(row, self.purified(x))
                    found.setdefault(title(row), {})[f"{attack} {eps}"] = {
                        "alone": percent(alone), "purified": percent(purified), "either": percent(alone | purified)
                    }  # fmt: skip
        return found

    def classifiers(self) -> dict[str, Any]:
        """Accuracy of each classifier of the grid on the PixelDefend row's purified images."""
        purified = {name: self.purified(x) for name, x in self.strong.items()}
        return {
            title(row): {name: percent(self.right(row, x)) for name, x in purified.items()}
            for row in self.stages.classifiers()
        }

    def ascent(self) -> dict[str, Any]:
        """Accuracy and bits per dimension after greedy decoding, and after gradient ascent within the same radius."""
        model, images = density_model_of(self.stages), {"clean": self.stages.clean(0, self.images)}
        images |= {f"bim {eps}": self.attacked(self.row, "bim", eps) for eps in self.stages.grid.eps}
        found: dict[str, Any] = {}
        for name, x in images.items():
            levels = to_levels(x, UNIT)
            ways = {"greedy decoding": greedy_decode(model, levels, self.eps)}
            ways["gradient ascent"] = ascend_together(model, levels, self.eps)
            right = {way: self.right(self.row, from_levels(purified, UNIT)) for way, purified in ways.items()}
            more, fewer, p = mcnemar(np.subtract(*(right[way].astype(int) for way in reversed(ways))))
            found[name] = {
                way: {"accuracy_percent": percent(right[way]), "bits_per_dim": float(model.bits_per_dim(of).mean())}
                for way, of in ways.items()
            } | {"right_after_ascent_only": more, "right_after_greedy_decoding_only": fewer, "p": p}
        return found

    def recipes(self) -> dict[str, Any]:
        """Accuracy of VGG-16, alone and behind PixelDefend, by the number of steps it was trained for."""
        stages, found = self.stages, {}
        ours = next(row for row in stages.classifiers() if row.network == "vgg")
        others = {f"{steps:,} steps": replace(ours, steps=steps) for steps in OTHER_STEPS}
        every = from_levels(stages.data.x_test, UNIT), stages.data.y_test
        for name, row in {"as in the table": ours, **others}.items():
            accuracy = classifiers.accuracy(stages.classifier(row), *every)
            numbers: dict[str, Any] = {"all test images": round(100 * accuracy, 2)}
            for attack, eps in ((attack, eps) for attack in STRONG for eps in stages.grid.eps):
                x = self.attacked(row, attack, eps)
                alone, purified = self.right(row, x), self.right(row, self.purified(x))
                numbers[f"{attack} {eps}"] = {"alone": percent(alone), "purified": percent(purified)}
            found[name] = numbers
        return found

    def sigma(self) -> dict[str, Any]:
        """Accuracy behind the score purifier by its noise, on the images that choose thresholds."""
        stages, (levels, y) = self.stages, self.stages.splits["reserve"]
        images = {"clean": from_levels(levels, UNIT)}
        for attack, eps in ((attack, eps) for attack in STRONG for eps in stages.grid.eps):
            cell = Cell(self.row.classifier, attack, eps)
            images[f"{attack} {eps}"] = stages.attacked(cell, 0, len(y), "reserve")
        classifier, found = stages.classifier(self.row.classifier), {}
        for sigma in SIGMAS:
            purifier = stages.build(score_purifier(sigma=sigma, seed=stages.grid.seed))
            found[str(sigma)] = {
                name: percent(classifier.predict(purifier(x)[0], 250).argmax(axis=1) == y) for name, x in images.items()
            }
        return {"images": len(y), "accuracy_percent": found}

    def attacks(self) -> dict[str, Any]:
        """Perturbations of DeepFool and CW before clipping, in levels; accuracy under BIM with four times its steps."""
        chunk, clean, found = self.stages.grid.chunk, self.stages.clean(0, self.images), {}
        classifier = self.stages.classifier(self.row.classifier)
        for attack in (name for name in self.stages.grid.attacks if not ATTACKS[name].uses_eps):
            cell = Cell(replace(self.row, defence="none"), attack, TOP)  # clipped to nothing
            starts = range(0, self.images, chunk)
            x = np.concatenate([self.stages.attacked(cell, s, min(chunk, self.images - s)) for s in starts])
            right = self.right(self.row, clean)
            moved = np.abs(x - clean).max(axis=(1, 2, 3))[right & ~self.right(self.row, x)] * TOP
            found[attack] = {
                "right": int(right.sum()),
                "fooled": len(moved),
                "levels_quartiles": np.quantile(moved, [0.25, 0.5, 0.75]).tolist() if len(moved) else [],
            }
        for eps in self.stages.grid.eps:
            longer = make_attack("bim", classifier, eps, max_iter=4 * bim_steps(eps), eps_step=level(classifier))
            x = longer.generate(clean, np.eye(len(self.stages.data.classes), dtype=np.float32)[self.y])
            found[f"bim {eps}, four times the steps"] = percent(self.right(self.row, x))
        return found


def percent(right: np.ndarray) -> float:
    """The share of images that are right, in percent."""
    return round(100 * float(right.mean()), 2)


PARTS = {
    "density_models": Ablations.density_models, "eps_defend": Ablations.eps_defend, "thresholds": Ablations.thresholds,
    "classifiers": Ablations.classifiers, "ascent": Ablations.ascent, "recipes": Ablations.recipes,
    "sigma": Ablations.sigma, "attacks": Ablations.attacks,
}  # fmt: skip


def main(
    work: Annotated[Path, typer.Option(help="folder of paper_table.py")],
    dataset: Annotated[str, typer.Option(help="fashion-mnist or cifar-10")] = "fashion-mnist",
    density_model: Annotated[list[Path], typer.Option(help="another density model, or the checkpoint of a run")] = [],  # noqa: B006
    part: Annotated[list[str], typer.Option(help=f"only this of {', '.join(PARTS)}; may be repeated")] = [],  # noqa: B006
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 1000,
    pixel_cnn: PixelCnn = None,
    chunk: Chunk = None,
    shorter: Shorter = [],  # noqa: B006
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; default: results/DATASET-causes.json")] = None,
) -> None:
    """Run all measurements, or some."""
    if unknown := [one for one in part if one not in PARTS]:
        raise typer.BadParameter(f"--part must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    grid = table_grid(dataset, pixel_cnn=pixel_cnn, chunk=chunk, shorter=shorter)
    others = {path.parent.name: as_start(path, PixelCNNpp, name="--density-model") for path in density_model}
    ablations = Ablations(Stages(grid, datasets.load(grid.dataset, data_dir), Store(work)), images, others)
    result = {
        **facts_of_run("causes.py"), "images": images, "classifier": title(ablations.row)
    } | {name: measure(ablations) for name, measure in PARTS.items() if not part or name in part}  # fmt: skip
    write_atomically(out or RESULTS / f"{dataset}-causes.json", json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
