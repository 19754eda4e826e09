"""The paper's tables with their figures, from the name of a data set."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

from art_pixeldefend import datasets
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.grid import Grid
from art_pixeldefend.evaluation.paper import drawing
from art_pixeldefend.evaluation.paper.ascent import figure_5
from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL, GRIDS
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.files import check_folder, write_atomically
from art_pixeldefend.processes import process_group
from art_pixeldefend.validation import check_choice, check_count


def reproduce(
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
    overwrite: bool = False,
    verbose: bool = True,
) -> str:
    """Regenerate a table, or resume it, and write ``table.md``, ``table.csv``, figures and all results into ``out``.

    Under ``torchrun`` every process calls this with the same arguments; the table does not depend on their number.

    Args:
        grid: a key of ``GRIDS``, or a grid like those.
        out: a folder; results in it that have the same settings are reused.
        data_dir: folder of the official data files, as in ``datasets.load``.
        pixel_cnn: the density model, a bundled name or a path, instead of the grid's.
        rows: a part of the rows, as in :meth:`Grid.only`.
        attacks: comma-separated names; only these columns.
        limit: at most this many test images.
        dry_run: compute nothing, and return how much is stored and how much would be computed.
        figures: draw them into ``out/figures``, as described in :func:`drawing.draw`.
        starts: random starts of L-BFGS-B per image of Figure 5 (the paper: 100), each about 120 gradients of the
            density model. 0 skips the figure.
        overwrite: replace the table and figures of another grid in ``out``; its finished cells are kept.
        verbose: show progress; in a dry run, list every cell.

    Returns:
        The table as Markdown; for a dry run what is stored and what is not, as text.

    Raises:
        ValueError: for an unknown name, a part without rows, ``starts`` for a grid without a row for Figure 5, or a
            folder with another grid's table. A cell that fails raises nothing: its error is recorded.
    """
    if isinstance(grid, str):
        check_choice("grid", grid, GRIDS)
        grid = GRIDS[grid]
    if pixel_cnn is not None:
        grid = replace(grid, models={**grid.models, DENSITY_MODEL: pixel_cnn})
    grid = grid.only(rows, tuple(attacks.split(",")) if attacks else None, limit)
    if check_count("starts", starts, 0) and drawing.drawn_row(grid) is None:
        raise ValueError(f"starts must be 0 for a grid without a blind pixeldefend row, got {starts}")
    stages = Stages(grid, datasets.load(grid.dataset, data_dir), Store(out))
    if dry_run:
        return runner.plan(stages, every_cell=verbose)
    if figures:
        drawing.check_reference(stages)
    _claim(Path(out), grid, overwrite)
    outcome, _ = table_and_figures(stages, figures=figures, verbose=verbose)
    if starts:
        figure_5(stages, Path(out) / "figures" / "figure5", images=min(10, grid.images, grid.chunk), starts=starts)
    return outcome.table


def _claim(folder: Path, grid: Grid, overwrite: bool) -> None:
    """Record the grid in the folder of its results; refuse a folder with the table or figures of another one."""
    record = folder / "grid.json"
    settings = json.dumps(asdict(replace(grid, paper=None)), indent=1) + "\n"
    same = record.is_file() and record.read_text() == settings
    found = [name for name in ("table.md", "table.csv", "figures") if (folder / name).exists()]
    if found and not same and not overwrite:
        raise ValueError(
            f"{str(folder)!r} already holds {' and '.join(found)} of another grid (other rows, attacks, images or "
            "model); overwrite=True replaces them and keeps finished cells"
        )
    check_folder(folder, overwrite=True)
    group = process_group()
    group.wait()
    if group.rank == 0:
        write_atomically(record, settings)


def table_and_figures(
    stages: Stages, *, figures: bool = True, verbose: bool = True
) -> tuple[runner.Outcome, list[Path]]:
    """Compute a grid's table and draw its figures, unless a cell of the row that they show failed.

    Returns:
        The outcome of the table, and the files that this process drew.

    Raises:
        ValueError: if the figures would show images that they also compare with.
    """
    if figures:
        drawing.check_reference(stages)
    outcome, drawn = runner.carry_out(stages, verbose=verbose), []
    row, group = drawing.drawn_row(stages.grid), process_group()
    if figures and row and all("right" in result for cell, result in outcome.results.items() if cell.row == row):
        drawing.score(stages, group)
        if group.rank == 0:
            drawn = drawing.draw(stages, stages.store.folder / "figures")
    group.wait()
    return outcome, drawn
