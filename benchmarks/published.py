"""What the scripts of published tables share: run a grid in a work folder, then write its table beside the others."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from art_pixeldefend import classifiers, datasets
from art_pixeldefend.evaluation import runner, table
from art_pixeldefend.evaluation.grid import Grid
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import title
from art_pixeldefend.files import write_atomically

RESULTS = Path(__file__).parent / "results"
# Options whose values say something about one machine only.
PLACES = {"--work": "FOLDER", "--results": "FOLDER", "--density-model": "FILE", "--out": "FILE"}


def command(script: str) -> str:
    """As it was given, places on this machine aside."""
    given = [PLACES.get(before, a) for before, a in zip(sys.argv, sys.argv[1:], strict=False)]
    launcher = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']}" if "RANK" in os.environ else "python"
    return " ".join([launcher, f"benchmarks/{script}", *(repr(a) if "!" in a else a for a in given)])


def publish(
    grid: Grid,
    work: Path,
    results: Path,
    name: str,
    head: Callable[[dict[str, Any]], str],
    data_dir: Path | None,
    figures: Sequence[str] = ("*",),
) -> str:
    """Run what is missing of a grid; then ``NAME.md``, ``.csv``, ``.json`` and ``NAME-FIGURE.png`` into ``results``.

    Under ``torchrun`` all processes compute and the first one writes.

    Args:
        grid: the table.
        work: folder of everything between.
        results: folder of the table.
        name: its files' stem.
        head: what stands above the table, given the facts.
        data_dir: where the official data files are.
        figures: patterns of those that are copied, as PNG; without any, none are drawn.

    Returns:
        The table as Markdown.
    """
    markdown = runner.run(grid, work, data_dir=data_dir, figures=bool(figures))
    if int(os.environ.get("RANK", "0")) > 0:
        return markdown
    stages = Stages(grid, datasets.load(grid.dataset, data_dir), Store(work))
    cells = {cell: _result(stages, cell) for cell in grid.cells()}
    facts = facts_of(stages)
    write_atomically(results / f"{name}.md", head(facts) + classifiers_table(facts) + markdown)
    write_atomically(results / f"{name}.csv", table.comma_separated(grid, cells))
    # A cell a line: what changes from run to run is seen in a diff.
    lines = ",\n".join(json.dumps(cell, sort_keys=True) for cell in cells.values())
    write_atomically(results / f"{name}.json", f'{{"facts": {json.dumps(facts, indent=1)},\n"cells": [\n{lines}\n]}}\n')
    for pattern in (*(f"{figure}.png" for figure in figures), "detection.json") if figures else ():
        for figure in sorted((work / "figures").glob(pattern)):
            shutil.copyfile(figure, results / f"{name}-{figure.name}")
    return markdown


def _result(stages: Stages, cell: Any) -> dict[str, Any]:
    try:
        return stages.store.read("cells", stages.cell_key(cell)) or {}
    except Exception as error:  # what keeps a cell from having settings failed it, and is in the table
        return {"cell": cell.name, "error": f"{type(error).__name__}: {error}"}


def facts_of(stages: Stages) -> dict[str, Any]:
    """What was measured with, and how good classifiers and density model are without an attack."""
    x, y = stages.data.x_test.astype(np.float32) / 255, stages.data.y_test
    return {
        "date": date.today().isoformat(), "hardware": runner.hardware(), "versions": dict(runner.versions()),
        "test_images": len(y),
        "classifiers": {
            title(row): {
                "accuracy_percent": 100 * classifiers.accuracy(stages.classifier(row, False), x, y),
                "training": stages.training(row),
            }
            for row in stages.classifiers()
            if stages.trained(row)
        },
        "thresholds_bits_per_dim": {
            row.name: arguments["threshold"]
            for row in stages.grid.rows
            if row.defence == "adaptive-pixeldefend" and stages.trained(row)
            for _, arguments in stages.steps(row)
        },
        "density_model": Path(stages.grid.pixel_cnn).name,
        "density_model_provenance": stages.pixel_cnn.provenance,
        "density_model_configuration": stages.pixel_cnn.configuration,
    }  # fmt: skip


def density_model(facts: dict[str, Any], papers: float) -> str:
    """The density model in words, beside the paper's bits per dimension."""
    sizes, bits = facts["density_model_configuration"], facts["density_model_provenance"].get("test_bits_per_dim")
    measured = f", {bits:.3f} bits per dimension on test images (the paper's: {papers})" if bits else ""
    return f"`{facts['density_model']}`, {sizes['filters']} filters, {sizes['resnets']} resnets{measured}"


def classifiers_table(facts: dict[str, Any]) -> str:
    """Each classifier's steps and clean accuracy on all test images."""
    lines = [
        f"| classifier, training | steps | accuracy on all {facts['test_images']:,} test images |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {made['training']['recipe']['steps']:,} | {made['accuracy_percent']:.2f} |"
        for name, made in facts["classifiers"].items()
    ]
    chosen = ", ".join(f"{name} {value:.3f}" for name, value in facts["thresholds_bits_per_dim"].items())
    return "\n".join(lines) + (f"\n\nThresholds chosen, in bits per dimension: {chosen}.\n\n" if chosen else "\n\n")
