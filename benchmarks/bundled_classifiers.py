"""Make the classifiers of ``art_pixeldefend/classifiers/weights``, normal and adversarially trained, with their cards.

    OMP_NUM_THREADS=1 python benchmarks/bundled_classifiers.py fashion-mnist --work FOLDER
    OMP_NUM_THREADS=1 python benchmarks/bundled_classifiers.py cifar-10 --work FOLDER

The first writes ``fashion-mnist-resnet``, and ``fashion-mnist-resnet-pgd-8`` and ``-25``, which continue from a normal
one; the second ``cifar-10-resnet`` and ``cifar-10-resnet-fgsm``. Classifiers of ``paper_table.py`` are taken from that
table's folder, given the same ``--shorter``, and trained first if they are not there. ``--name`` selects some.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bundled_models import TITLES
from published import PLACES, DataDir, Shorter, Work, command, table_grid

from art_pixeldefend import classifiers, datasets
from art_pixeldefend.classifiers.networks import WEIGHTS
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store

OF_TABLES = {  # by data set: name and row of the table
    "fashion-mnist": {"fashion-mnist-resnet": Row("resnet", "normal")},
    "cifar-10": {"cifar-10-resnet": Row("resnet", "normal"), "cifar-10-resnet-fgsm": Row("resnet", "adversarial-fgsm")},
}
TUNED = {"fashion-mnist": {"fashion-mnist-resnet-pgd-8": 8, "fashion-mnist-resnet-pgd-25": 25}}  # name and radius
RECIPE = classifiers.Recipe(steps=500, learning_rate=0.05, weight_decay=1e-4)


def store(name: str, network: Any, provenance: dict[str, Any], data: datasets.Dataset, out: Path) -> None:
    """Write a classifier in half precision, and its card."""
    path = out / f"{name}.safetensors"
    classifiers.save(path, network, dtype=torch.float16)
    x = data.x_test.astype(np.float32) / 255
    accuracy = classifiers.accuracy(classifiers.as_art(classifiers.load(path)), x, data.y_test)
    provenance |= {
        "dataset": data.name, "accuracy": accuracy, "date": date.today().isoformat(), "hardware": runner.hardware(),
    }  # fmt: skip
    classifiers.save(path, network, provenance, dtype=torch.float16)
    path.with_suffix(".md").write_text(card(name, provenance, data, path.stat().st_size))
    print(f"{name}: {100 * accuracy:.2f} % of {len(x):,} test images", flush=True)


def card(name: str, facts: dict[str, Any], data: datasets.Dataset, size: int) -> str:
    """The card of a classifier."""
    channels, height, width = data.image_shape
    seconds = f"; {facts['cpu_seconds']:.0f} CPU seconds" if facts["cpu_seconds"] is not None else ""
    how, limits = f"{facts['steps']:,} steps of {facts['batch_size']} images", ""
    if "start" in facts:
        attack = f"three quarters of every batch attacked by PGD within {facts['delta']} levels, 2 steps, random start"
        how = f"from {facts['start']}: {how}, {attack}"
        limits = "The ResNet that it continues from has also seen images of the calibration split.\n"
    else:
        how = f"the {facts['recipe']} recipe, {how}"
        if "delta" in facts:
            share, attack = f"{100 * facts['ratio']:.0f}%", facts["technique"].rpartition("-")[2].upper()
            radius = rf"\|N(0, {facts['delta']:g})\| levels"  # a bar ends a cell
            how += f", {share} of every batch attacked by {attack} within {radius} (PixelDefend, Appendix B)"
    results = "adaptive-evaluation" if data.name == "fashion-mnist" else data.name
    shape = f"{height} x {width}, {'grey' if channels == 1 else 'RGB'}"
    return f"""# {name}

A classifier of {TITLES[data.name]} ({shape}): the ResNet with 62 layers of PixelDefend's Appendix C, from images in
[0, 1] to logits.

| | |
| --- | --- |
| accuracy | **{100 * facts["accuracy"]:.2f} %** of the {len(data.x_test):,} test images |
| trained on | {facts["split"]} |
| training | {how}{seconds} |
| command | `{facts["command"]}` |
| hardware, date | {facts["hardware"]}, {facts["date"]} |
| size | {size / 1000:.0f} kB in half precision |

Accuracies under attack: `benchmarks/results/{results}.md`.
{limits}"""


def main(
    work: Work,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help=" or ".join(OF_TABLES))] = "fashion-mnist",
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="folder for the classifiers")] = WEIGHTS,
    name: Annotated[list[str], typer.Option(help="write this one only; may be repeated")] = [],  # noqa: B006
    shorter: Shorter = [],  # noqa: B006
    start: Annotated[Path | None, typer.Option(help="another normal classifier to tune")] = None,
) -> None:
    """Train what is missing and write weights and cards."""
    if dataset not in OF_TABLES:
        raise typer.BadParameter(f"DATASET must be one of {', '.join(OF_TABLES)}, got {dataset!r}")
    of_tables, tuned = OF_TABLES[dataset], TUNED.get(dataset, {})
    if unknown := [one for one in name if one not in of_tables | tuned]:
        raise typer.BadParameter(f"--name must be one of {', '.join(of_tables | tuned)}, got {unknown[0]!r}")
    data, line = (
        datasets.load(dataset, data_dir),
        command("bundled_classifiers.py", PLACES | {"--start": "FILE", "--out": "FOLDER"}),
    )
    grid = table_grid(dataset, shorter=shorter)
    for made, row in of_tables.items():
        if not name or made in name:
            export(made, row_of(grid, row), Stages(grid, data, Store(work), verbose=True), line, out)
    for made, delta in tuned.items():
        if not name or made in name:
            tune(made, delta, start, data, line, out)


def row_of(grid: Grid, row: Row) -> Row:
    """The row, with the grid's training steps for its classifier."""
    steps = {other.steps for other in grid.rows if (other.network, other.training) == (row.network, row.training)}
    return replace(row, steps=next(iter(steps)))


def export(name: str, row: Row, stages: Stages, line: str, out: Path) -> None:
    """Write a classifier of the table."""
    checkpoint = stages.store.path("classifiers", stages.training(row), ".run")
    began, whole = time.process_time(), not (stages.trained(row) or checkpoint.is_file())
    network, recipe = stages.model(row), stages.recipe(row)
    seconds = round(time.process_time() - began, 1) if whole else None
    count, left_out = len(stages.splits["train"][0]), stages.grid.validation
    facts: dict[str, Any] = {
        "command": line, "recipe": stages.grid.recipe, "steps": recipe.steps, "batch_size": recipe.batch_size,
        "technique": row.training, "cpu_seconds": seconds,
        "split": f"{count:,} of the official training images, all but the last {left_out} in the data folder",
    }  # fmt: skip
    facts |= {key: value for key, value in stages.training(row).items() if key in ("delta", "ratio")}
    store(name, network, facts, stages.data, out)


def tune(name: str, delta: int, start: Path | None, data: datasets.Dataset, line: str, out: Path) -> None:
    """Train a normal classifier further, on PGD within ``delta`` levels, and write it."""
    normal = next(iter(OF_TABLES[data.name]))
    network = classifiers.load(start or out / f"{normal}.safetensors")
    seen = network.provenance.get("split", "images that its file does not name")
    began = time.process_time()
    classifiers.train(
        network, data.x_train, data.y_train, RECIPE, "adversarial-pgd", delta=delta, seed=delta, verbose=True
    )
    seconds = time.process_time() - began
    facts = {"command": line, "steps": RECIPE.steps, "batch_size": RECIPE.batch_size, "delta": delta}
    facts |= {
        "split": f"the {len(data.x_train):,} images of the train split (`art_pixeldefend.datasets`)",
        "cpu_seconds": round(seconds, 1),
        "start": f"a ResNet trained on {seen}" if start else normal,
    }
    store(name, network, facts, data, out)


if __name__ == "__main__":
    typer.run(main)
