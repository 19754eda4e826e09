"""Draw Figure 5 of the paper: greedy decoding against SciPy's L-BFGS-B from random starts, in bits per dimension.

    python benchmarks/figure5.py --work FOLDER --starts 20

An interrupted run continues, and ``torchrun`` divides the starts among processes. ``--work`` may be the folder of the
grid's script; with the same ``--chunk`` and ``--shorter``, its classifiers and attacked images are used. One start on
Fashion-MNIST evaluates the model about 120 times, 9 seconds of a CPU core with ``--pixel-cnn fashion-mnist``.
"""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from published import RESULTS, Chunk, DataDir, PixelCnn, Shorter, Work, command, table_grid

from art_pixeldefend import datasets
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.paper.ascent import figure_5
from art_pixeldefend.evaluation.paper.likelihoods import density_model
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store
from art_pixeldefend.files import write_atomically


def main(
    work: Work,
    dataset: Annotated[str, typer.Option(help="fashion-mnist or cifar-10 (the paper)")] = "fashion-mnist",
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 10,
    starts: Annotated[int, typer.Option(help="random starts of L-BFGS-B per image")] = 100,
    iterations: Annotated[int | None, typer.Option(help="iterations per start; default: SciPy's limit")] = None,
    pixel_cnn: PixelCnn = None,
    chunk: Chunk = None,
    shorter: Shorter = [],  # noqa: B006
    data_dir: DataDir = None,
    results: Annotated[Path, typer.Option(help="folder for figure and numbers")] = RESULTS,
) -> None:
    """Write ``DATASET-figure5.png`` and ``.json``."""
    grid = table_grid(dataset, pixel_cnn=pixel_cnn, chunk=chunk, shorter=shorter)
    stages = Stages(grid, datasets.load(dataset, data_dir), Store(work))
    numbers = figure_5(stages, work / "figure5", images=images, starts=starts, iterations=iterations)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    path = results / f"{dataset}-figure5"
    facts = {"dataset": dataset, "command": command("figure5.py"), "date": date.today().isoformat()}
    facts |= {"hardware": runner.hardware()}
    facts |= {"versions": dict(runner.versions()), "density_model": density_model(stages).provenance}
    write_atomically(path.with_suffix(".json"), json.dumps(facts | numbers, indent=1) + "\n")
    write_atomically(path.with_suffix(".png"), (work / "figure5.png").read_bytes())
    shown = {name: value for name, value in numbers.items() if name != "bits_per_dim"}
    typer.echo(json.dumps(shown, indent=1))


if __name__ == "__main__":
    typer.run(main)
