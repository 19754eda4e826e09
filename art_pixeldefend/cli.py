"""``art-pixeldefend``: the commands, thin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _several_commands() -> None:
    """PixelDefend: detect and purify adversarial images with a PixelCNN++."""


Data = Annotated[str, typer.Argument(help="digits, fashion-mnist, cifar-10, a folder of images, or an .npz")]
DataDir = Annotated[Path | None, typer.Option(help="where the official data files are", envvar="ART_PIXELDEFEND_DATA")]
Verbose = Annotated[bool, typer.Option("--verbose/--quiet", help="show progress bars")]


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="the run's folder: model.safetensors, metrics.jsonl, samples.png")],
    data_dir: DataDir = None,
    filters: Annotated[int, typer.Option(help="feature maps")] = 40,
    resnets: Annotated[int, typer.Option(help="gated resnets per stage")] = 5,
    mixtures: Annotated[int, typer.Option(help="logistic components per sub-pixel")] = 10,
    dropout: Annotated[float, typer.Option(help="probability")] = 0.5,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="images per step and process")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Adam's, at its highest")] = 2e-3,
    seed: Annotated[int, typer.Option(help="of weights, order and dropout")] = 0,
    every: Annotated[int, typer.Option(help="steps between evaluations, each with a checkpoint")] = 1_000,
    resume: Annotated[bool, typer.Option(help="go on from the folder's checkpoint, if it has one")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU where there is one")] = None,
    mixed_precision: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="bf16 autocast; by default where the hardware has it")
    ] = None,
    verbose: Verbose = True,
) -> None:
    """Train a density model. Several processes: torchrun --nproc-per-node 2 -m art_pixeldefend train ..."""
    from art_pixeldefend import datasets
    from art_pixeldefend.density.trainer import Settings
    from art_pixeldefend.density.trainer import train as run

    settings = Settings(
        filters=filters, resnets=resnets, mixtures=mixtures, dropout=dropout, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, seed=seed, every=every, dataset=data,
    )  # fmt: skip
    images = datasets.load(data, data_dir)
    model = run(
        settings, images.x_train, images.x_test, out,
        resume=resume, device=device, mixed_precision=mixed_precision, verbose=verbose,
    )  # fmt: skip
    if "test_bits_per_dim" in model.provenance:
        typer.echo(f"{model.provenance['test_bits_per_dim']:.4f} bits/dim on {len(images.x_test)} held-out images")


def main() -> None:
    """Run the command line; errors that the user can mend are one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
