"""Compute the paper's Table 1, Fashion-MNIST, or Table 2, CIFAR-10, and its defences under the other threat model.

    python benchmarks/paper_table.py fashion-mnist --work FOLDER
    python benchmarks/paper_table.py cifar-10 --work FOLDER

writes ``results/DATASET.md``, ``.csv``, ``.json`` and the figures. The folder keeps classifiers, attacked images,
purified images and cells, so that an interrupted run continues, and a later run with more rows keeps the cells that are
there. In two processes:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/paper_table.py fashion-mnist --work FOLDER

Training by BIM takes as long as several other classifiers: ``--rows '!adversarial-bim'`` leaves its rows out,
``--shorter adversarial-bim=4000`` trains its classifier for fewer steps, which the table then states.
``--rows resnet/normal/`` computes the rows of one classifier.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from published import (
    RESULTS,
    Chunk,
    DataDir,
    Fewer,
    PixelCnn,
    Shorter,
    Work,
    command,
    density_model,
    publish,
    table_grid,
)

from art_pixeldefend.evaluation.grid import Grid
from art_pixeldefend.evaluation.paper.grids import GRIDS

PAPER = {  # title, number of the table, bits per dimension of the paper's density model
    "fashion-mnist": ("Fashion-MNIST", 1, 2.7),
    "cifar-10": ("CIFAR-10", 2, 3.0),
}
FIRST_LABELS = {"cifar-10": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]}  # of the test images in the official files
Dataset = Annotated[str, typer.Argument(metavar="DATASET", help=" or ".join(PAPER))]


def main(
    dataset: Dataset,
    work: Work,
    data_dir: DataDir = None,
    limit: Annotated[int | None, typer.Option(help="test images, from the first on; default: the grid's")] = None,
    rows: Annotated[str | None, typer.Option(help="only rows with one of these words; !WORD: rows without it")] = None,
    attacks: Annotated[str | None, typer.Option(help="only these comma-separated attacks")] = None,
    fewer: Fewer = [],  # noqa: B006
    shorter: Shorter = [],  # noqa: B006
    pixel_cnn: PixelCnn = None,
    chunk: Chunk = None,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
    name: Annotated[str | None, typer.Option(help="stem of the table's files; default: the data set")] = None,
    figures: Annotated[bool, typer.Option(help="draw the figures")] = True,
) -> None:
    """Compute and write the table."""
    if dataset not in PAPER:
        raise typer.BadParameter(f"DATASET must be one of {', '.join(PAPER)}, got {dataset!r}")
    grid = table_grid(dataset, pixel_cnn=pixel_cnn, chunk=chunk, fewer=fewer, shorter=shorter)
    grid = replace(grid, images=limit or grid.images).only(rows, tuple(attacks.split(",")) if attacks else None)
    publish(grid, work, results, name or dataset, lambda facts: head(facts, grid), data_dir, ("*",) if figures else ())


def head(facts: dict[str, Any], grid: Grid) -> str:
    """The text above the table: command, date, hardware, models and missing rows."""
    title, number, bits = PAPER[grid.dataset]
    return f"""# {title}: attacks and defences beside PixelDefend's Table {number}

`{command("paper_table.py")}`, {facts["date"]}, {facts["hardware"]}.
Classifiers: the paper's ResNet-62 and VGG-16 by the recipe `{grid.recipe}`. Density model: {
        density_model(facts, bits)
    }.
PixelDefend: eps {grid.defences["pixeldefend"][0][1]["eps"]}.{_left_out(grid)}{_order(facts, grid)}

"""


def _order(facts: dict[str, Any], grid: Grid) -> str:
    """A remark if the first test images are not those of the official files."""
    if FIRST_LABELS.get(grid.dataset, facts["first_labels"]) == facts["first_labels"]:
        return ""
    return " The test images are the official ones in another order: the first of them are a random sample."


def _left_out(grid: Grid) -> str:
    """Which rows of the whole table are missing: their names if they are few."""
    there, whole = {(row.name, row.eps) for row in grid.rows}, GRIDS[grid.dataset].rows
    missing = list(dict.fromkeys(row.name for row in whole if (row.name, row.eps) not in there))
    if len(missing) < 5:
        return f" Left out: {', '.join(missing)}." if missing else ""
    return f" {len(there)} of {len(whole)} rows."


if __name__ == "__main__":
    typer.run(main)
