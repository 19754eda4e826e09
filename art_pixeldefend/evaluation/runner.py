"""Running a grid: cell after cell, resumable at each, its images shared out among processes."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import art
import numpy as np
import torch
from tqdm import tqdm

from art_pixeldefend import __version__, datasets
from art_pixeldefend.evaluation import drawing, table
from art_pixeldefend.evaluation.cost import estimate
from art_pixeldefend.evaluation.grid import GRIDS, Cell, Grid, paper_accuracy
from art_pixeldefend.evaluation.paper.ascent import figure_5
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.files import write_atomically
from art_pixeldefend.processes import ProcessGroup, process_group
from art_pixeldefend.validation import check_count

Results = dict[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        table: as Markdown.
        results: of every cell, those that failed among them.
        figures: the files that this process drew.
    """

    table: str
    results: Results
    figures: list[Path]


def run(
    grid: Grid | str,
    out: str | PathLike[str],
    *,
    data_dir: str | PathLike[str] | None = None,
    pixel_cnn: str | None = None,
    rows: str | None = None,
    attacks: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    figures: bool = True,
    starts: int = 0,
    verbose: bool = True,
) -> str:
    """Regenerate a table, or go on with it, and leave ``table.md``, ``table.csv`` and everything behind it in ``out``.

    Under ``torchrun`` every process calls this with the same arguments; the table is the same.

    Args:
        grid: one of yours, or the name of one of ``GRIDS``.
        out: a folder; results in it that have the same settings are taken as they are.
        data_dir: where the official data files are, as in ``datasets.load``.
        pixel_cnn: the density model, a bundled name or a path, instead of the grid's.
        rows: comma-separated words; only rows with one of them in their name.
        attacks: comma-separated names; only these columns.
        limit: at most so many test images.
        dry_run: say what would be done and about how long it would take, and do nothing.
        figures: draw them into the folder ``figures`` of ``out``, as :func:`drawing.draw` describes.
        starts: of L-BFGS-B for each image of Figure 5 (the paper: 100), which :func:`ascent.figure_5` draws beside
            them; 0: no Figure 5, which takes 120 gradients of the density model a start.
        verbose: show progress.

    Returns:
        The table as Markdown; for a dry run the cells with their states and the estimate.

    Raises:
        ValueError: for an unknown name, nothing left to do, or ``starts`` without a row for Figure 5. A cell that fails
            raises nothing: it is recorded.
    """
    grid = _named(grid, pixel_cnn).only(rows, tuple(attacks.split(",")) if attacks else None, limit)
    if check_count("starts", starts, 0) and drawing.drawn_row(grid) is None:
        raise ValueError(f"starts must be 0 for a grid without a bare pixeldefend row, got {starts}")
    stages = Stages(grid, datasets.load(grid.dataset, data_dir), Store(out))
    if dry_run:
        return estimate(stages)
    outcome = carry_out(stages, figures=figures, verbose=verbose)
    if starts:
        figure_5(stages, Path(out) / "figures" / "figure5", images=min(10, grid.images, grid.chunk), starts=starts)
    return outcome.table


def carry_out(stages: Stages, *, figures: bool = True, verbose: bool = True) -> Outcome:
    """Compute what is missing of a grid, and leave table and figures in the folder of its store.

    Args:
        stages: of the grid.
        figures: draw them, unless a cell of the row that they are about failed.
        verbose: show progress.

    Raises:
        ValueError: if the figures would show images that they also compare with.
    """
    grid, out, drawn = stages.grid, stages.store.folder, []
    if figures:
        drawing.check_reference(stages)
    group = process_group()
    stages.verbose = verbose and group.rank == 0
    _train(stages, group)
    _calibrate(stages, group)
    results = _cells(stages, group, verbose)
    markdown = table.markdown(grid, results)
    if group.rank == 0:
        write_atomically(out / "table.md", markdown)
        write_atomically(out / "table.csv", table.comma_separated(grid, results))
    row = drawing.drawn_row(grid)
    if figures and row and all("right" in result for cell, result in results.items() if cell.row == row):
        drawing.score(stages, group)
        if group.rank == 0:
            drawn = drawing.draw(stages, out / "figures")
    group.wait()
    return Outcome(markdown, results, drawn)


def _named(grid: Grid | str, pixel_cnn: str | None) -> Grid:
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
        grid = GRIDS[grid]
    return grid if pixel_cnn is None else replace(grid, pixel_cnn=pixel_cnn)


def _train(stages: Stages, group: ProcessGroup) -> None:
    """Every missing classifier, each by one process; one that fails fails its cells, later."""
    missing = group.gather([row for row in stages.classifiers() if not stages.trained(row)])[0]
    for row in group.shard(missing):
        _try(partial(stages.model, row))  # the cells that need it report a failure
    _tell_failures(stages, group)


def _calibrate(stages: Stages, group: ProcessGroup) -> None:
    """Every missing threshold, each by one process; where one fails, so will its cells, later."""
    missing, _ = _try(stages.uncalibrated)
    for row in group.shard(group.gather(missing or [])[0]):
        _try(partial(stages.steps, row))
    _tell_failures(stages, group)


def _tell_failures(stages: Stages, group: ProcessGroup) -> None:
    """What one process could not make, no other tries."""
    for failures in group.gather(stages.failures):
        stages.failures |= failures


def _cells(stages: Stages, group: ProcessGroup, verbose: bool) -> Results:
    """Results of all cells; finished ones are read, failed ones tried again."""
    cells, results = list(stages.grid.cells()), {}
    total = sum(stages.count(cell.row) for cell in cells)
    bar = tqdm(total=total, unit="image", disable=not verbose or group.rank > 0)
    with bar:
        for cell in cells:
            bar.set_description_str(cell.name)
            results[cell] = _cell(cell, stages, group, bar)
    return results


def _cell(cell: Cell, stages: Stages, group: ProcessGroup, bar: tqdm) -> dict[str, Any]:
    """One cell's result: right or wrong for every image, or the error that stopped it."""
    began, start = time.perf_counter(), bar.n
    count = stages.count(cell.row)
    key, errors = _try(lambda: stages.cell_key(cell))
    # One process decides for all: another run may finish the cell between one's look and the other's.
    kept = group.gather(stages.store.read("cells", key) if errors is None else None)[0]
    if kept is not None and "error" not in kept:
        bar.update(count)
        return kept
    starts = range(0, count, stages.grid.chunk)
    mine: dict[int, list[bool]] = {}
    if errors is None:
        errors = _chunks(cell, stages, group.shard(starts), count, mine, bar, group.world_size)
    everyone = group.gather((mine, errors))
    bar.update(start + count - bar.n)
    failed = [error for _, error in everyone if error is not None]
    right = {s: chunk for chunks, _ in everyone for s, chunk in chunks.items()}
    seconds = time.perf_counter() - began
    result = _result(cell, stages, key, seconds) | (
        {"error": failed[0]} if failed else _counts(np.concatenate([right[s] for s in starts]))
    )
    if group.rank == 0:
        stages.store.write("cells", key or {"cell": cell.name, "dataset": stages.grid.dataset}, result)
    group.wait()  # nobody reads the next cell's files before this one's are there
    return result


def _chunks(
    cell: Cell, stages: Stages, starts: Sequence[int], count: int, mine: dict[int, list[bool]], bar: tqdm, world: int
) -> str | None:
    """Fill ``mine`` with this process's chunks; the error that stopped it, if one did."""
    for s in starts:
        size = min(stages.grid.chunk, count - s)
        right, error = _try(partial(stages.right, cell, s, size))
        if error is not None:
            return error
        mine[s] = right.tolist()
        bar.update(min(size * world, bar.total - bar.n))
    return None


def _try(compute: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None) or (None, what went wrong). Interruptions are not caught."""
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
    """What every result carries, failed or not."""
    eps = cell.eps or stages.grid.eps_of(cell.row)[0]  # the paper prints clean accuracy under every radius
    return {
        "cell": cell.name, "row": asdict(cell.row), "attack": cell.attack, "eps": cell.eps, "settings": key,
        "paper_percent": paper_accuracy(stages.grid, cell.row, cell.attack, eps),
        "seconds": round(seconds, 2), "date": date.today().isoformat(), "versions": versions(), "hardware": hardware(),
    }  # fmt: skip


@cache
def versions() -> Mapping[str, str]:
    """Of what results depend on."""
    return {
        "art_pixeldefend": __version__, "adversarial-robustness-toolbox": art.__version__, "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip


@cache
def hardware() -> str:
    """What computes."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s) a process"
