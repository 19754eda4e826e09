"""Compute the rows of the paper's Table 2, CIFAR-10, with small models: a test of the code, not of the defence.

    art-pixeldefend train cifar-10 --out FOLDER/density --filters 24 --resnets 1 \\
        --steps 400 --learning-rate 4e-3 --dropout 0
    python benchmarks/cifar10.py --work FOLDER --pixel-cnn FOLDER/density/model.safetensors --limit 8 --steps 200

writes ``results/cifar-10-small.md``, ``.csv``, ``.json`` and figures. ``torchrun --nproc-per-node 2
benchmarks/cifar10.py ...`` uses two processes. ``art-pixeldefend grid cifar-10 --model FILE --out FOLDER`` computes the
table at full size, on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from published import RESULTS, DataDir, Work, command, density_model, publish

from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL, GRIDS

SIZES = {"resnet": {"width": 8, "units": 3}, "vgg": {"width": 4}}


def main(
    work: Work,
    pixel_cnn: Annotated[Path, typer.Option(help="density model, a .safetensors file")],
    data_dir: DataDir = None,
    limit: Annotated[int, typer.Option(help="test images, from the first on")] = 20,
    steps: Annotated[int, typer.Option(help="training steps of each classifier")] = 500,
    rows: Annotated[str | None, typer.Option(help="only rows with one of these words; !WORD: rows without it")] = None,
    attacks: Annotated[str | None, typer.Option(help="only these comma-separated attacks")] = None,
    results: Annotated[Path, typer.Option(help="folder for the table")] = RESULTS,
) -> None:
    """Compute and write the small table."""
    # Two chunks, one for each of two processes.
    grid = replace(
        GRIDS["cifar-10"],
        models={DENSITY_MODEL: str(pixel_cnn)},
        images=limit, steps=steps, sizes=SIZES, chunk=-(-limit // 2), validation=40,
    )  # fmt: skip
    grid = replace(grid, rows=tuple(replace(row, images=None) for row in grid.rows))
    grid = grid.only(rows, tuple(attacks.split(",")) if attacks else None)
    figures = ("samples", "strips-8", "p-values-8")
    publish(grid, work, results, "cifar-10-small", lambda facts: head(facts, limit, steps), data_dir, figures)


def head(facts: dict[str, Any], limit: int, steps: int) -> str:
    """The text above the table, which states the scale first."""
    resnet, vgg = SIZES["resnet"], SIZES["vgg"]
    return f"""# CIFAR-10 with small models: the rows of PixelDefend's Table 2

**{limit} test images; ResNet-{6 * resnet["units"] + 2} of width {resnet["width"]} and VGG of width {vgg["width"]}, {
        steps:,} training steps each** (the paper: 10,000 images, both of width 16, ResNet-62, 80,000 steps). Density
model: {density_model(facts, 3.0)}; the paper's has 160 filters and 5 resnets. Differences from the paper measure this
scale, and no more.

`{command("cifar10.py")}`, {facts["date"]}, {facts["hardware"]}.
PixelDefend: eps 16.

"""


if __name__ == "__main__":
    typer.run(main)
