"""Compute the paper's Table 1, Fashion-MNIST, and its defences under the other threat model.

    python benchmarks/fashion_mnist.py --work FOLDER

writes ``results/fashion-mnist.md``, ``.csv``, ``.json`` and the figures. The folder keeps classifiers, attacked images,
purified images and cells, so that an interrupted run continues. In two processes:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/fashion_mnist.py --work FOLDER

BIM training with delta 25 takes about half as long as all the rest on a CPU: ``--rows '!adversarial-bim-delta-25'``
omits that row, ``--shorter adversarial-bim-delta-25/none=1500`` trains its classifier for fewer steps, which the table
then states.
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

from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL, GRIDS

GRID = GRIDS["fashion-mnist"]


def main(
    work: Work,
    data_dir: DataDir = None,
    limit: Annotated[int, typer.Option(help="test images, from the first on")] = GRID.images,
    rows: Annotated[str | None, typer.Option(help="only rows with one of these words; !WORD: rows without it")] = None,
    attacks: Annotated[str | None, typer.Option(help="only these comma-separated attacks")] = None,
    fewer: Fewer = [],  # noqa: B006
    shorter: Shorter = [],  # noqa: B006
    pixel_cnn: PixelCnn = GRID.models[DENSITY_MODEL],
    chunk: Chunk = GRID.chunk,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
    name: Annotated[str, typer.Option(help="stem of the table's files")] = "fashion-mnist",
    figures: Annotated[bool, typer.Option(help="draw the figures")] = True,
) -> None:
    """Compute and write the table."""
    grid = table_grid("fashion-mnist", pixel_cnn=pixel_cnn, chunk=chunk, fewer=fewer, shorter=shorter)
    grid = replace(grid, images=limit).only(rows, tuple(attacks.split(",")) if attacks else None)
    publish(grid, work, results, name, lambda facts: head(facts, grid.rows), data_dir, ("*",) if figures else ())


def head(facts: dict[str, Any], rows: tuple) -> str:
    """The text above the table: command, date, hardware and models."""
    there = {(row.name, row.eps) for row in rows}
    missing = [row.name for row in GRID.rows if (row.name, row.eps) not in there]
    left_out = f" Left out: {', '.join(missing)}." if missing and len(missing) < 5 else ""
    return f"""# Fashion-MNIST: attacks and defences beside PixelDefend's Table 1

`{command("fashion_mnist.py")}`, {facts["date"]}, {facts["hardware"]}.
Classifiers: the paper's ResNet-62 and VGG-16 by the quick recipe. Density model: {density_model(facts, 2.7)}.
PixelDefend: eps 32.{left_out}

"""


if __name__ == "__main__":
    typer.run(main)
