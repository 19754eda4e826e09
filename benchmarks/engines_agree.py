"""Compare the Fashion-MNIST table and its purified images with those of another decoding engine.

    python benchmarks/engines_agree.py --work FOLDER --method cached
    python benchmarks/engines_agree.py --work FOLDER --method reference --limit 20 --rows vgg

``FOLDER`` is the one of ``paper_table.py``. Pass the same ``--shorter``, ``--chunk`` and ``--pixel-cnn`` as to that
script; otherwise classifiers and images are computed again. The attacked images of the blind PixelDefend rows are
purified again with the given engine and classified again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from published import Chunk, DataDir, PixelCnn, Shorter, command, table_grid
from tqdm import tqdm

from art_pixeldefend import datasets
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.grid import Cell
from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL, GRIDS
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import to_levels

ROWS = "/pixeldefend/blind"


def main(
    work: Annotated[Path, typer.Option(help="folder of paper_table.py")],
    method: Annotated[str, typer.Option(help="engine to compare with")] = "cached",
    limit: Annotated[int, typer.Option(help="images of each cell, from the first on")] = GRIDS["fashion-mnist"].images,
    rows: Annotated[str | None, typer.Option(help="only rows with one of these words; !WORD: rows without it")] = None,
    pixel_cnn: PixelCnn = None,
    chunk: Chunk = None,
    shorter: Shorter = [],  # noqa: B006
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Purify again; count differing images and sub-pixels, and each cell's correct images with either engine."""
    grid = table_grid("fashion-mnist", pixel_cnn=pixel_cnn, chunk=chunk, shorter=shorter).only(ROWS).only(rows)
    stages, cells = Stages(grid, datasets.load(grid.dataset, data_dir), Store(work)), list(grid.cells())
    images = sub_pixels = 0
    right: dict[str, list[int]] = {}
    began = time.perf_counter()
    for cell in tqdm(cells):
        counts = right.setdefault(cell.name, [0, 0])
        for y, purified in both(stages, cell, method, limit):
            differs = np.not_equal(*(to_levels(x) for x in purified))
            images += int(differs.any(axis=(1, 2, 3)).sum())
            sub_pixels += int(differs.sum())
            for i, x in enumerate(purified):
                counts[i] += int((stages.classifier(cell.row).predict(x).argmax(axis=1) == y).sum())
    result = {
        "command": command("engines_agree.py"),
        "date": date.today().isoformat(), "hardware": runner.hardware(),
        "density_model": Path(grid.models[DENSITY_MODEL]).name, "method": method, "cells": len(cells),
        "images": limit * len(cells), "images_that_differ": images,
        "sub_pixels_that_differ": sub_pixels, "right_by_cell": right,
        "cells_that_differ": sum(a != b for a, b in right.values()), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    typer.echo(json.dumps(result, indent=1))
    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")


def both(stages: Stages, cell: Cell, method: str, limit: int) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """For each chunk: its labels, and its images purified for the table and by ``method``."""
    again = stages.build([(path, dict(arguments) | {"method": method}) for path, arguments in stages.steps(cell.row)])
    chunk = stages.grid.chunk
    for start in range(0, limit, chunk):
        size = min(chunk, limit - start)  # a part of the grid's chunk
        attacked, defended = (of(cell, start, chunk)[:size] for of in (stages.attacked, stages.defended))
        yield stages.data.y_test[start : start + size], [defended, again(attacked)[0]]


if __name__ == "__main__":
    typer.run(main)
