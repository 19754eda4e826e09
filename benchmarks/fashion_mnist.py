"""PixelDefend on Fashion-MNIST beside the paper's Table 1: the paper's ResNet, five attacks, three defences.

    python benchmarks/fashion_mnist.py --work /tmp/fashion-mnist

writes ``results/fashion-mnist.md``, ``.csv`` and ``.json``. Stopped, it goes on where it was. The classifier lies
beside the results, and is trained (15 minutes on a CPU core) where it does not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from art_pixeldefend import classifiers, datasets
from art_pixeldefend.evaluation import runner, table
from art_pixeldefend.evaluation.grid import CHEAP, GRIDS, Row
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.files import write_atomically

RESULTS = Path(__file__).parent / "results"
WEIGHTS = RESULTS / "fashion-mnist-resnet.safetensors"
GRID = replace(
    GRIDS["fashion-mnist"],
    rows=(
        Row("resnet", "normal"),
        Row("resnet", "normal", "feature-squeezing", "through"),
        Row("resnet", "normal", "feature-squeezing", "bare"),
        Row("resnet", "normal", "pixeldefend", "bare"),
        Row("resnet", "normal", "pixeldefend", "through", CHEAP),
    ),
    steps=1800,
    images=200,
    validation=0,  # no threshold to choose: the classifier sees all training images
)


def main(
    work: Annotated[Path, typer.Option(help="folder for everything between: attacked images, purified images, cells")],
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="the official files")] = None,
    limit: Annotated[int, typer.Option(help="test images, from the first on")] = GRID.images,
    rows: Annotated[str | None, typer.Option(help="only rows with one of these comma-separated words")] = None,
    pixel_cnn: Annotated[str, typer.Option(help="density model: a bundled name or a path")] = GRID.pixel_cnn,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
) -> None:
    """Regenerate the table."""
    grid = replace(GRID, images=limit, pixel_cnn=pixel_cnn)
    stages = Stages(grid, datasets.load(grid.dataset, data_dir), Store(work))
    use_trained(stages)
    markdown = runner.run(grid, work, data_dir=data_dir, rows=rows, figures=rows is None)
    grid = grid.only(rows)
    cells = {cell: stages.store.read("cells", stages.cell_key(cell)) or {} for cell in grid.cells()}
    facts = facts_of(stages)
    write_atomically(results / "fashion-mnist.md", head(facts) + markdown)
    write_atomically(results / "fashion-mnist.csv", table.comma_separated(grid, cells))
    write_atomically(
        results / "fashion-mnist.json", json.dumps(facts | {"cells": list(cells.values())}, indent=1) + "\n"
    )
    typer.echo(markdown)


def use_trained(stages: Stages) -> None:
    """Take the classifier from beside the results if it is the grid's, or leave it there once it is trained."""
    settings = stages.training(GRID.rows[0])
    kept = stages.store.path("classifiers", settings, ".safetensors")
    if WEIGHTS.is_file() and not kept.is_file() and classifiers.load(WEIGHTS)[1] == json.loads(json.dumps(settings)):
        write_atomically(kept, WEIGHTS.read_bytes())
    stages.model(GRID.rows[0])
    if not WEIGHTS.is_file():
        shutil.copyfile(kept, WEIGHTS)


def facts_of(stages: Stages) -> dict:
    """What was measured with, and how good classifier and density model are without an attack."""
    x, y = stages.data.x_test.astype(np.float32) / 255, stages.data.y_test
    classifier = stages.classifier(GRID.rows[0], False)
    return {
        "date": date.today().isoformat(), "hardware": runner.hardware(), "versions": dict(runner.versions()),
        "classifier_test_accuracy_percent": 100 * classifiers.accuracy(classifier, x, y),
        "density_model": stages.grid.pixel_cnn, "density_model_provenance": stages.pixel_cnn.provenance,
        "density_model_configuration": stages.pixel_cnn.configuration,
    }  # fmt: skip


def head(facts: dict) -> str:
    """Above the table: what it is and where it comes from."""
    bits = facts["density_model_provenance"].get("test_bits_per_dim")
    sizes = facts["density_model_configuration"]
    model = f"{sizes['filters']} filters, {sizes['resnets']} resnets"
    return f"""# Fashion-MNIST: attacks and defences beside PixelDefend's Table 1

`python benchmarks/fashion_mnist.py --work FOLDER`, {facts["date"]}, {facts["hardware"]}.
Classifier: the paper's ResNet-62, trained {GRID.steps:,} steps; {facts["classifier_test_accuracy_percent"]:.2f}% on all
10,000 test images (the paper's: 93%). Density model: `{facts["density_model"]}`, {model}{
        f", {bits:.3f} bits per dimension on all test images (the paper's: 2.7)" if bits else ""
    }. PixelDefend: eps 32.

"""


if __name__ == "__main__":
    typer.run(main)
