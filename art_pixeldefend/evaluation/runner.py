"""Run a grid cell by cell, resuming from what is stored, its images shared out among processes."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from os import PathLike
from typing import Any

import art
import numpy as np
import torch
from tqdm import tqdm

from art_pixeldefend import __version__, datasets
from art_pixeldefend.attacks import ATTACKS
from art_pixeldefend.evaluation import table
from art_pixeldefend.evaluation.grid import CLEAN, Cell, Grid
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.files import write_atomically
from art_pixeldefend.processes import ProcessGroup, process_group

Results = dict[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Args:
        table: as Markdown.
        results: of every cell, including those that failed.
    """

    table: str
    results: Results


def run(
    grid: Grid, out: str | PathLike[str], *, data_dir: str | PathLike[str] | None = None, verbose: bool = True
) -> Outcome:
    """Compute a grid's table, or resume it, and write ``table.md``, ``table.csv`` and all results into ``out``.

    Under ``torchrun`` every process calls this with the same arguments; the table does not depend on their number.

    Args:
        grid: the table.
        out: a folder; results in it that have the same settings are reused.
        data_dir: folder of the official data files, as in ``datasets.load``.
        verbose: show progress.
    """
    return carry_out(Stages(grid, datasets.load(grid.dataset, data_dir), Store(out)), verbose=verbose)


def plan(stages: Stages, *, every_cell: bool = False) -> str:
    """Return, as text, how much of the grid is stored and how much :func:`carry_out` would compute.

    Args:
        stages: of the grid.
        every_cell: list the classifiers, thresholds and cells instead, each with its state.
    """
    grid = stages.grid
    training = [row for row in stages.classifiers() if not stages.trained(row)]
    uncalibrated = stages.uncalibrated()
    stored = {cell: _is_stored(stages, cell) for cell in grid.cells()}
    if every_cell:
        lines = [f"to train: {table.title(row)}, {stages.recipe(row).steps} steps" for row in training]
        lines += [f"to calibrate: {row.name}" for row in uncalibrated]
        for cell, there in stored.items():
            gradients = 0 if cell.attack == CLEAN else ATTACKS[cell.attack].gradients(cell.eps)
            work = f"{stages.count(cell.row)} images, gradients per image: {gradients}"
            lines.append(f"done:   {cell.name}" if there else f"to do:  {cell.name}, {work}")
        return "\n".join(lines) + "\n"
    threats = Counter("none" if row.defence == "none" else row.threat.name for row in grid.rows)
    counts = [stages.count(row) for row in grid.rows]
    fewer = [count for count in counts if count < max(counts)]
    attacks = dict.fromkeys(attack for row in grid.rows for attack in grid.attacks_of(row))
    done = sum(stored.values())
    facts = {
        "images": f"the first {max(counts):,} test images"
        + (f"; fewer, from {min(fewer)} on, in {len(fewer)} of the rows" if fewer else ""),
        "rows": f"{len(grid.rows)}: " + ", ".join(
            f"{count} {'without a defence' if name == 'none' else name}" for name, count in threats.items()
        ),
        "attacks": f"{', '.join(attacks)} within {' and '.join(map(str, grid.eps))} levels",
        "classifiers": f"{len(training)} to train, {len(stages.classifiers()) - len(training)} stored",
        "thresholds": f"{len(uncalibrated)} to choose",
        "cells": f"{len(stored) - done} to compute, {done} stored",
    }  # fmt: skip
    return "".join(f"{name + ':':<13}{text}\n" for name, text in facts.items())


def _is_stored(stages: Stages, cell: Cell) -> bool:
    """Whether the cell's number is stored, without an error."""
    kept = stages.store.read("cells", stages.cell_key(cell)) if stages.calibrated(cell.row) else None
    return kept is not None and "error" not in kept


def carry_out(stages: Stages, *, verbose: bool = True) -> Outcome:
    """Compute the cells that are missing, and write the table into the folder of the store.

    A cell that fails is recorded with its error and stops no other cell.

    Args:
        stages: of the grid.
        verbose: show progress.
    """
    group = process_group()
    stages.verbose = verbose and group.rank == 0
    _train(stages, group)
    _calibrate(stages, group)
    results = _cells(stages, group)
    markdown = table.markdown(stages.grid, results)
    if group.rank == 0:
        write_atomically(stages.store.folder / "table.md", markdown)
        write_atomically(stages.store.folder / "table.csv", table.comma_separated(stages.grid, results))
    group.wait()
    return Outcome(markdown, results)


def _train(stages: Stages, group: ProcessGroup) -> None:
    """Train every missing classifier in one process; a failure is reported by the cells that need it."""
    missing = group.gather([row for row in stages.classifiers() if not stages.trained(row)])[0]
    for row in group.shard(missing):
        _try(partial(stages.model, row))
    _share_failures(stages, group)


def _calibrate(stages: Stages, group: ProcessGroup) -> None:
    """Choose every missing threshold in one process; a failure is reported by the cells that need it."""
    missing, _ = _try(stages.uncalibrated)
    for row in group.shard(group.gather(missing or [])[0]):
        _try(partial(stages.steps, row))
    _share_failures(stages, group)


def _share_failures(stages: Stages, group: ProcessGroup) -> None:
    """Tell all processes what failed in one, so that none repeats it."""
    for failures in group.gather(stages.failures):
        stages.failures |= failures


def _cells(stages: Stages, group: ProcessGroup) -> Results:
    """Return the results of all cells; finished cells are read, failed ones are tried again."""
    cells = list(stages.grid.cells())
    return {cell: _cell(cell, stages, group, f"{i}/{len(cells)} {cell.name}") for i, cell in enumerate(cells, 1)}


def _cell(cell: Cell, stages: Stages, group: ProcessGroup, title: str) -> dict[str, Any]:
    """Return one cell's result: right or wrong for every image, or the error that stopped it."""
    began, count = time.perf_counter(), stages.count(cell.row)
    key, error = _try(lambda: stages.cell_key(cell))
    # One process decides for all: another run may finish the cell between two processes' look at the store.
    kept = group.gather(stages.store.read("cells", key) if error is None else None)[0]
    if kept is not None and "error" not in kept:
        return kept
    starts = range(0, count, stages.grid.chunk)
    mine: dict[int, list[bool]] = {}
    if error is None:
        error = _chunks(cell, stages, group.shard(starts), mine, title)
    everyone = group.gather((mine, error))
    errors = [error for _, error in everyone if error is not None]
    right = {start: chunk for chunks, _ in everyone for start, chunk in chunks.items()}
    seconds = time.perf_counter() - began
    result = _result(cell, stages, key, seconds) | (
        {"error": errors[0]} if errors else _counts(np.concatenate([right[start] for start in starts]))
    )
    if group.rank == 0:
        stages.store.write("cells", key or {"cell": cell.name, "dataset": stages.grid.dataset}, result)
    group.wait()  # the next cell may read this one's files
    return result


def _chunks(cell: Cell, stages: Stages, starts: Sequence[int], mine: dict[int, list[bool]], title: str) -> str | None:
    """Fill ``mine`` with this process's chunks; return the error that stopped it, if one did."""
    count, chunk = stages.count(cell.row), stages.grid.chunk
    # The bar estimates the time that remains from the first chunk on.
    for start in tqdm(starts, title, unit="chunk", disable=not stages.verbose, leave=False):
        right, error = _try(partial(stages.right, cell, start, min(chunk, count - start)))
        if error is not None:
            return error
        mine[start] = right.tolist()
    return None


def _try(compute: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (result, None) or (None, error message). Interruptions are not caught."""
    try:
        return compute(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"


def _counts(right: np.ndarray) -> dict[str, Any]:
    low, high = table.wilson(int(right.sum()), len(right))
    return {
        "right": "".join("1" if r else "0" for r in right), "correct": int(right.sum()), "count": len(right),
        "accuracy_percent": 100 * float(right.mean()), "interval_percent": [100 * low, 100 * high],
    }  # fmt: skip


def _result(cell: Cell, stages: Stages, key: Any, seconds: float) -> dict[str, Any]:
    """Return what every result contains, failed or not."""
    eps = cell.eps or stages.grid.eps_of(cell.row)[0]  # the paper prints clean accuracy for every radius
    paper = stages.grid.paper
    return {
        "cell": cell.name, "row": asdict(cell.row) | {"threat": cell.row.threat.key}, "attack": cell.attack,
        "eps": cell.eps, "settings": key,
        "paper_percent": paper(stages.grid, cell.row, cell.attack, eps) if paper else None,
        "seconds": round(seconds, 2), "date": date.today().isoformat(), "versions": versions(), "hardware": hardware(),
    }  # fmt: skip


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of the packages that results depend on."""
    return {
        "art_pixeldefend": __version__, "adversarial-robustness-toolbox": art.__version__, "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip


@cache
def hardware() -> str:
    """Describe the hardware of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s) a process"
