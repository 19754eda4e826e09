"""Shared by the scripts: options that change a grid, publication of its table, and the command line to show."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import binomtest

from art_pixeldefend import PixelCNNpp, classifiers, datasets
from art_pixeldefend.evaluation import runner, table
from art_pixeldefend.evaluation.grid import Grid, Row, current_name
from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL, GRIDS
from art_pixeldefend.evaluation.paper.likelihoods import density_model as density_model_of
from art_pixeldefend.evaluation.paper.reproduce import table_and_figures
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.evaluation.table import markdown_table, title
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models import zoo
from art_pixeldefend.models.zoo import as_model

RESULTS = Path(__file__).parent / "results"

# Options whose values are paths on one machine, and options whose values are paths unless they are a known name.
PLACES = {
    "--work": "FOLDER", "--results": "FOLDER", "--data-dir": "FOLDER", "--density-model": "FILE",
    "--out": "FILE", "--output": "FILE",
}  # fmt: skip
NAMES = {
    "--pixel-cnn": zoo.names(), "--model": zoo.names(), "--classifier": classifiers.names(),
    "--data": list(datasets.NAMED),
}  # fmt: skip


def command(script: str, places: Mapping[str, str] = PLACES) -> str:
    """The command line of this run, with placeholders for paths, which are the values of the options ``places``."""
    launcher = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']}" if "RANK" in os.environ else "python"
    return f"{launcher} benchmarks/{script} {shlex.join(_shown(sys.argv[1:], places))}".rstrip()


def facts_of_run(script: str) -> dict[str, Any]:
    """Command, date, hardware and versions of this run, for its results."""
    return {
        "command": command(script), "date": date.today().isoformat(), "hardware": runner.hardware(),
        "versions": dict(runner.versions()),
    }  # fmt: skip


def _shown(arguments: Iterable[str], places: Mapping[str, str]) -> Iterator[str]:
    """The words of a command line with placeholders; ``--option=value`` becomes two words."""
    option = ""
    for word in (w for a in arguments for w in (a.split("=", 1) if a.startswith("--") else [a])):
        if option in places:
            yield places[option]
        elif option in NAMES and word not in NAMES[option]:
            yield "FILE"
        else:
            yield word
        option = word


def page_only(write: Callable[[], None]) -> Any:
    """A flag that calls ``write`` and ends the script, whatever other options are missing."""

    def at_once(given: bool) -> None:
        if given:
            write()
            raise typer.Exit

    text = "write the page of the published results again, and compute nothing"
    return typer.Option("--page-only", callback=at_once, is_eager=True, help=text)


# The grid

# Options of the scripts that work in a table's folder. With the table's own values they find its stored results.
Work = Annotated[Path, typer.Option(help="folder for intermediate results")]
DataDir = Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="folder of the official data files")]
PixelCnn = Annotated[str | None, typer.Option(help="density model: a bundled name or a path")]
Chunk = Annotated[int | None, typer.Option(min=1, help="images that a process attacks and purifies at a time")]
Fewer = Annotated[list[str], typer.Option(help="NAME=N: N test images for rows whose name ends in NAME")]
Shorter = Annotated[
    list[str], typer.Option(help="NAME=N: N training steps for classifiers (NETWORK/TRAINING) whose name ends in NAME")
]


def table_grid(
    name: str,
    *,
    pixel_cnn: str | None = None,
    chunk: int | None = None,
    fewer: Iterable[str] = (),
    shorter: Iterable[str] = (),
) -> Grid:
    """One of ``GRIDS``, changed by the options of the scripts; None leaves a setting unchanged.

    Raises:
        typer.BadParameter: for an unknown grid, or a change that is not ``NAME=N`` or matches no row.
    """
    if name not in GRIDS:
        raise typer.BadParameter(f"the data set must be one of {', '.join(GRIDS)}, got {name!r}")
    grid = GRIDS[name]
    if pixel_cnn is not None:
        grid = replace(grid, models={**grid.models, DENSITY_MODEL: pixel_cnn})
    if chunk is not None:
        grid = replace(grid, chunk=chunk)
    changes = [("--fewer", "images", [row.name for row in grid.rows], choice) for choice in fewer]
    # The name of a classifier's own row, as in "vgg/normal/none", stands for the classifier.
    trained = [row.classifier.name.removesuffix("/none") for row in grid.rows]
    changes += [("--shorter", "steps", trained, current_name(choice).replace("/none=", "=")) for choice in shorter]
    for option, what, names, choice in changes:
        grid = replace(grid, rows=_changed(grid.rows, option, what, names, choice))
    return grid


def _changed(rows: tuple[Row, ...], option: str, what: str, names: list[str], choice: str) -> tuple[Row, ...]:
    """The rows, with another number of images or steps where their name in ``names`` ends in the given one."""
    name, _, count = current_name(choice).rpartition("=")
    if not name or not count.isdecimal() or not int(count):
        raise typer.BadParameter(f"{option} must be NAME=N with N at least 1, got {choice!r}")
    if not any(known.endswith(name) for known in names):
        raise typer.BadParameter(f"{option} must end like one of {', '.join(dict.fromkeys(names))}, got {name!r}")
    return tuple(
        replace(row, **{what: int(count)}) if known.endswith(name) else row
        for row, known in zip(rows, names, strict=True)
    )


# The table


def publish(
    grid: Grid,
    work: Path,
    results: Path,
    name: str,
    head: Callable[[dict[str, Any]], str],
    data_dir: Path | None,
    figures: Sequence[str] = ("*",),
) -> str:
    """Compute the missing cells of a grid; write ``NAME.md``, ``.csv``, ``.json`` and ``NAME-FIGURE.png``.

    Under ``torchrun`` all processes compute and the first one writes.

    Args:
        grid: the table.
        work: folder for intermediate results.
        results: folder for the table.
        name: stem of the table's files.
        head: returns the text above the table, given the facts.
        data_dir: folder of the official data files.
        figures: patterns of the figures that are copied, as PNG, if this run drew them; if empty, none are drawn.

    Returns:
        The table as Markdown.

    Raises:
        FileNotFoundError: if the density model does not exist, before anything is computed.
    """
    as_model(grid.models[DENSITY_MODEL], PixelCNNpp, torch.device("cpu"), name="--pixel-cnn")
    stages = Stages(grid, datasets.load(grid.dataset, data_dir), Store(work))
    outcome, drawn = table_and_figures(stages, figures=bool(figures))
    if int(os.environ.get("RANK", "0")) > 0:
        return outcome.table
    cells = [_without_traceback(cell) for cell in outcome.results.values()]
    facts = origin(cells) | facts_of(stages)
    write_atomically(results / f"{name}.md", head(facts) + classifiers_table(facts) + outcome.table)
    write_atomically(results / f"{name}.csv", table.comma_separated(grid, outcome.results))
    # One cell per line, so that a diff shows what has changed.
    lines = ",\n".join(json.dumps(cell, sort_keys=True) for cell in cells)
    write_atomically(results / f"{name}.json", f'{{"facts": {json.dumps(facts, indent=1)},\n"cells": [\n{lines}\n]}}\n')
    for file in drawn:
        if file.name == "detection.json":
            numbers = facts_of_run(Path(sys.argv[0]).name) | json.loads(file.read_text())
            write_atomically(results / f"{name}-{file.name}", json.dumps(numbers, indent=1) + "\n")
        elif any(fnmatch(file.name, f"{pattern}.png") for pattern in figures):
            shutil.copyfile(file, results / f"{name}-{file.name}")
    return outcome.table


def _without_traceback(cell: dict[str, Any]) -> dict[str, Any]:
    return cell | ({"error": cell["error"].splitlines()[0]} if "error" in cell else {})


def origin(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Dates, hardware and versions of the cells: the first and last day, and every value that occurs.

    Cells of early versions have no date; the text then says "until".
    """
    days = sorted({cell.get("date", "") for cell in cells}) or [""]
    last = days[-1] or date.today().isoformat()
    versions: dict[str, list[str]] = {}
    for cell in cells:
        for package, version in cell["versions"].items():
            versions.setdefault(package, []).append(version)
    return {
        "date": last if days[0] == last else f"{days[0]} to {last}" if days[0] else f"until {last}",
        "hardware": "; ".join(dict.fromkeys(cell["hardware"] for cell in cells)),
        "versions": {package: ", ".join(dict.fromkeys(found)) for package, found in versions.items()},
    }


def facts_of(stages: Stages) -> dict[str, Any]:
    """Clean accuracies of the trained classifiers, the chosen thresholds, and the density model's provenance."""
    x, y = stages.data.x_test.astype(np.float32) / 255, stages.data.y_test
    return {
        "test_images": len(y),
        "first_labels": y[:10].tolist(),
        "classifiers": {
            title(row): {
                "accuracy_percent": 100 * classifiers.accuracy(stages.classifier(row), x, y),
                "training": stages.training(row),
            }
            for row in stages.classifiers()
            if stages.trained(row)
        },
        "thresholds_bits_per_dim": {
            row.name: arguments["threshold"]
            for row in stages.grid.rows
            if stages.trained(row) and stages.calibrated(row)
            for _, arguments in stages.steps(row)
            if "threshold" in arguments
        },
        "density_model": Path(stages.grid.models[DENSITY_MODEL]).name,
        "density_model_provenance": density_model_of(stages).provenance,
        "density_model_configuration": density_model_of(stages).configuration,
    }  # fmt: skip


def density_model(facts: dict[str, Any], papers: float) -> str:
    """The density model's name, size and bits per dimension, with the paper's."""
    sizes, bits = facts["density_model_configuration"], facts["density_model_provenance"].get("test_bits_per_dim")
    measured = f", {bits:.3f} bits per dimension on test images (the paper's: {papers})" if bits else ""
    return f"`{facts['density_model']}`, {sizes['filters']} filters, {sizes['resnets']} resnets{measured}"


def classifiers_table(facts: dict[str, Any]) -> str:
    """A table of each classifier's training steps and clean accuracy on all test images."""
    head = ["classifier, training", "steps", f"accuracy on all {facts['test_images']:,} test images"]
    rows = [
        [name, f"{made['training']['recipe']['steps']:,}", f"{made['accuracy_percent']:.2f}"]
        for name, made in facts["classifiers"].items()
    ]
    chosen = ", ".join(f"{name} {value:.3f}" for name, value in facts["thresholds_bits_per_dim"].items())
    chosen = f"Thresholds chosen, in bits per dimension: {chosen}.\n\n" if chosen else ""
    return f"{markdown_table(head, rows)}\n{chosen}"


def mcnemar(difference: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of paired results (N,), 1 or 0 each, from their differences: 1, 0 or -1.

    Returns:
        How often the first result alone is 1, how often the second, and the p-value.
    """
    more, fewer = int((difference > 0).sum()), int((difference < 0).sum())
    return more, fewer, float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
