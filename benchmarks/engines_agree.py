"""Is the Fashion-MNIST table the one that another engine makes, and its purified images in every sub-pixel?

    python benchmarks/engines_agree.py --work FOLDER --method cached
    python benchmarks/engines_agree.py --work FOLDER --method reference --limit 20

``FOLDER`` is that of ``fashion_mnist.py``. The attacked images of the bare PixelDefend row are purified again by the
engine named, and shown to the classifier again.
"""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from published import command
from tqdm import tqdm

from art_pixeldefend import datasets, greedy_decode
from art_pixeldefend.attacks.budget import from_levels, to_levels
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.drawing import drawn_row
from art_pixeldefend.evaluation.grid import GRIDS
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import UNIT, Store
from art_pixeldefend.files import write_atomically

EPS = 32  # of the table's PixelDefend


def main(
    work: Annotated[Path, typer.Option(help="the folder of fashion_mnist.py")],
    method: Annotated[str, typer.Option(help="the engine to compare with")] = "cached",
    limit: Annotated[int, typer.Option(help="images of each cell, from the first on")] = 1000,
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA", help="the official files")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Purify again and count what differs, and for each cell the images that are right by either engine."""
    grid = GRIDS["fashion-mnist"]
    stages, row = Stages(grid, datasets.load(grid.dataset, data_dir), Store(work)), drawn_row(grid)
    cells, chunk = [cell for cell in grid.cells() if cell.row == row], grid.chunk
    images = sub_pixels = 0
    right: dict[str, list[int]] = {}
    began = time.perf_counter()
    for cell in tqdm(cells):
        counts = right.setdefault(f"{cell.attack} {cell.eps}" if cell.eps else cell.attack, [0, 0])
        for start in range(0, limit, chunk):
            size = min(chunk, limit - start)  # of the chunk that the grid had
            attacked, defended = (of(cell, start, chunk)[:size] for of in (stages.attacked, stages.defended))
            again = greedy_decode(stages.pixel_cnn, to_levels(attacked, UNIT), EPS, method)
            differs = again != to_levels(defended, UNIT)
            images += int(differs.any(axis=(1, 2, 3)).sum())
            sub_pixels += int(differs.sum())
            y = stages.data.y_test[start : start + size]
            for i, x in enumerate((defended, from_levels(again, UNIT))):
                counts[i] += int((stages.classifier(row, False).predict(x).argmax(axis=1) == y).sum())
    result = {
        "command": command("engines_agree.py"),
        "date": date.today().isoformat(), "hardware": runner.hardware(), "method": method, "cells": len(cells),
        "images": limit * len(cells), "images_that_differ": images, "sub_pixels_that_differ": sub_pixels,
        "right_by_cell": right, "cells_that_differ": sum(a != b for a, b in right.values()),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    typer.echo(json.dumps(result, indent=1))
    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
