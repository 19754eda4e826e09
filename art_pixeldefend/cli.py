"""``art-pixeldefend``: the commands, thin."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # the commands import what they need when they run: --help answers at once
    import numpy as np

    from art_pixeldefend.image_files import ImageSet
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.processes import ProcessGroup

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _several_commands() -> None:
    """PixelDefend: detect and purify adversarial images with a PixelCNN++."""


Images = Annotated[Path, typer.Argument(help="a folder of images, a .npy or an .npz (uint8)")]
ImagesOrData = Annotated[str, typer.Argument(help="a folder, .npy or .npz of images, or a data set's name")]
BUNDLED = "digits, fashion-mnist, fashion-mnist-40x5"
Model = Annotated[str, typer.Option(help=f"{BUNDLED}, or a .safetensors file")]
BatchSize = Annotated[int, typer.Option(help="most images in memory at a time")]
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
    start_from: Annotated[
        str | None, typer.Option(help=f"begin with the weights of: {BUNDLED}, or a .safetensors file")
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the folder's checkpoint, if it has one")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU where there is one")] = None,
    mixed_precision: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="bf16 autocast; by default where the hardware has it")
    ] = None,
    verbose: Verbose = True,
) -> None:
    """Train a density model. Several processes: torchrun --nproc-per-node 2 -m art_pixeldefend train ..."""
    import torch

    from art_pixeldefend import datasets
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.training import Settings
    from art_pixeldefend.models.training import train as run
    from art_pixeldefend.models.zoo import as_model

    settings = Settings(
        filters=filters, resnets=resnets, mixtures=mixtures, dropout=dropout, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, seed=seed, every=every, dataset=data,
    )  # fmt: skip
    images = datasets.load(data, data_dir)
    cpu = torch.device("cpu")
    start = as_model(start_from, PixelCNNpp, cpu, name="--start-from") if start_from else None
    model = run(
        settings, images.x_train, images.x_test, out, start=start,
        resume=resume, device=device, mixed_precision=mixed_precision, verbose=verbose,
    )  # fmt: skip
    if "test_bits_per_dim" in model.provenance:
        typer.echo(f"{model.provenance['test_bits_per_dim']:.4f} bits/dim on {len(images.x_test)} held-out images")


@app.command()
def purify(
    images: Images,
    out: Annotated[Path, typer.Argument(help="where to write them: a folder for a folder, an array for an array")],
    model: Model,
    eps: Annotated[int, typer.Option(help="how far a pixel may move, in levels 0..255")] = 16,
    threshold: Annotated[float, typer.Option(help="bits/dim below which an image is left alone")] = 0.0,
    batch_size: BatchSize = 128,
    verbose: Verbose = True,
) -> None:
    """Purify images: move every pixel, within eps, to its most likely value.

    Several processes share the images: torchrun --nproc-per-node 2 -m art_pixeldefend purify ...
    """
    from art_pixeldefend import AdaptivePixelDefend, PixelDefend
    from art_pixeldefend.image_files import check_target, read_images, write_images
    from art_pixeldefend.processes import process_group

    group = process_group()
    clip_values, pixel_cnn = (0, 255), _model_of(group, model)
    found = read_images(images, pixel_cnn.image_shape[:1])
    check_target(out, found)
    options: dict = {"batch_size": batch_size, "verbose": verbose and group.rank == 0}
    if threshold:
        defence = AdaptivePixelDefend(clip_values, eps, pixel_cnn, threshold=threshold, **options)
    else:  # likelihoods need not be known
        defence = PixelDefend(clip_values, eps, pixel_cnn, **options)
    with _throughput(group, len(found.levels), verbose):
        purified = _shared(group, found.levels, lambda some: defence(some)[0])
    if group.rank == 0:
        write_images(out, purified, like=found)
        typer.echo(f"{len(purified)} images purified into {out}")


@app.command()
def score(
    images: ImagesOrData,
    model: Model,
    out: Annotated[Path | None, typer.Option(help="write each image's figure to this CSV file", dir_okay=False)] = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 128,
    verbose: Verbose = True,
) -> None:
    """Print the mean bits per dimension of images, or of a data set's test images.

    Several processes share the images: torchrun --nproc-per-node 2 -m art_pixeldefend score ...
    """
    from art_pixeldefend import PixelDefendDetector
    from art_pixeldefend.files import check_file
    from art_pixeldefend.processes import process_group

    group = process_group()
    if out:
        check_file(out)
    pixel_cnn, shown = _model_of(group, model), verbose and group.rank == 0
    found = _images_or_test_images(images, pixel_cnn, data_dir)
    if not len(found.levels):
        raise ValueError(f"{images!r} holds no images, which have no mean")
    detector = PixelDefendDetector(pixel_cnn, (0, 255), batch_size=batch_size, verbose=shown)
    with _throughput(group, len(found.levels), verbose):
        bits = _shared(group, found.levels, detector.bits_per_dim)
    if group.rank == 0:
        if out:
            _write_csv(out, {"image": found.names, "bits_per_dim": bits})
        typer.echo(f"{bits.mean():.4f} bits/dim, mean of {len(bits)} images")


@app.command()
def detect(
    images: ImagesOrData,
    model: Model,
    out: Annotated[Path, typer.Option(help="the CSV file: image, p_value, bits_per_dim, adversarial", dir_okay=False)],
    calibration: Annotated[
        str | None,
        typer.Option(help="clean images that the model was not trained on: a data set, a folder, .npy or .npz"),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(help="the model's training images, as in the paper: flags more clean images than --alpha"),
    ] = None,
    likelihoods: Annotated[
        Path | None,
        typer.Option(help="keep the likelihoods of these images in this file, and use it if it exists", dir_okay=False),
    ] = None,
    alpha: Annotated[float, typer.Option(help="call an image adversarial up to this p-value")] = 0.05,
    data_dir: DataDir = None,
    batch_size: BatchSize = 128,
    verbose: Verbose = True,
) -> None:
    """Test whether images are adversarial: p-values and bits per dimension, as CSV.

    Images are compared with clean ones like them. Of a data set, and of the images that the model was trained on,
    --calibration takes those that it has not seen; of a folder or file of other images, all.
    """
    from art_pixeldefend import PixelDefendDetector, datasets
    from art_pixeldefend.files import check_file
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.zoo import as_model

    check_file(out)
    if likelihoods and not likelihoods.exists():
        check_file(likelihoods)
    pixel_cnn = as_model(model, PixelCNNpp, name="--model")
    if calibration and training:
        raise ValueError("--calibration and --training must not both be given")
    found = _images_or_test_images(images, pixel_cnn, data_dir)
    detector = PixelDefendDetector(pixel_cnn, (0, 255), alpha=alpha, batch_size=batch_size, verbose=verbose)
    if likelihoods and likelihoods.exists():
        detector.load(likelihoods)
        for reference, source in (("calibration", calibration), ("training", training)):
            if source and reference != detector.reference:
                raise ValueError(f"--likelihoods {likelihoods} holds those of {detector.reference} images")
            if source:
                typer.echo(f"--{reference} {source} is not read: {likelihoods} holds the likelihoods", err=True)
    elif calibration:
        detector.fit(_calibration_images(calibration, pixel_cnn, data_dir))
    elif training:
        detector.fit(datasets.load(training, data_dir).train_and_calibration().x, reference="training")
    else:
        raise ValueError("--calibration must name images that the model was not trained on")
    if likelihoods and not likelihoods.exists():
        detector.save(likelihoods)
    if images in datasets.NAMED and detector.reference == "calibration":  # the other test images may calibrate
        found = replace(found, levels=datasets.load(images, data_dir).test(pixel_cnn).x)
    report, adversarial = detector.detect(found.levels)
    names = found.names[: len(found.levels)]
    columns = {"image": names, "p_value": report["p_values"], "bits_per_dim": report["bits_per_dim"]}
    _write_csv(out, columns | {"adversarial": adversarial.astype(int)})
    assert detector.log_likelihoods is not None
    typer.echo(
        f"{adversarial.sum()} of {len(adversarial)} images are adversarial at level {alpha:g}, compared with "
        f"{len(detector.log_likelihoods)} {detector.reference} images; see {out}"
    )


@app.command()
def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="a PNG sheet, or an array (.npy, .npz)", dir_okay=False)],
    count: Annotated[int, typer.Option(help="how many images", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """Draw images from a density model."""
    from art_pixeldefend.files import check_file
    from art_pixeldefend.image_files import ImageSet, write_images
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.zoo import as_model
    from art_pixeldefend.pictures import write_sheet

    if out.suffix not in (".png", ".npy", ".npz"):
        raise ValueError(f"--out must end in .png, .npy or .npz, got {str(out)!r}")
    check_file(out)
    pixel_cnn = as_model(model, PixelCNNpp, name="--model")
    if out.suffix == ".png" and pixel_cnn.image_shape[0] not in (1, 3):
        raise ValueError(f"--out must end in .npy or .npz for images of {pixel_cnn.image_shape[0]} channels")
    levels = pixel_cnn.sample(count, seed=seed).cpu().numpy()
    if out.suffix == ".png":
        write_sheet(out, levels)
    else:
        write_images(out, levels, like=ImageSet(levels, (), "NCHW"))
    typer.echo(f"{count} samples in {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of report.md, results.json and the pictures")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    verbose: Verbose = True,
) -> None:
    """Attack a small classifier of digits, then purify and detect: three minutes on two cores, no download."""
    import torch

    from art_pixeldefend.evaluation.demo import run

    torch.set_num_threads(1)  # images this small: threads cost more than they bring, minutes where cores are busy
    typer.echo(run(out, seed=seed, verbose=verbose))
    typer.echo(f"report and pictures: {out}")


@app.command()
def grid(
    name: Annotated[str, typer.Argument(help="fashion-mnist, cifar-10 or digits")],
    out: Annotated[Path, typer.Option(help="folder of the table and all behind it; what is in it is not done again")],
    model: Annotated[str | None, typer.Option(help="density model: a bundled name or a .safetensors file")] = None,
    rows: Annotated[
        str | None, typer.Option(help="only rows with one of these comma-separated words; !WORD: without it")
    ] = None,
    attacks: Annotated[str | None, typer.Option(help="only these comma-separated attacks")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many test images")] = None,
    starts: Annotated[int, typer.Option(help="L-BFGS-B's for each image of Figure 5 (the paper: 100); 0: none")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and how long it takes")] = False,
    data_dir: DataDir = None,
    verbose: Verbose = True,
) -> None:
    """Regenerate the paper's table of a data set: attacks, defences, classifiers. Stopped, it goes on where it was."""
    import torch

    from art_pixeldefend.evaluation.runner import run
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.zoo import as_model

    if model:
        as_model(model, PixelCNNpp, name="--model")  # now, and not in the cells after hours of training
    if name == "digits":
        torch.set_num_threads(1)  # as in the demo
    typer.echo(
        run(
            name, out, data_dir=data_dir, pixel_cnn=model, rows=rows, attacks=attacks, limit=limit,
            dry_run=dry_run, starts=starts, verbose=verbose,
        )
    )  # fmt: skip


def _model_of(group: ProcessGroup, model: str) -> PixelCNNpp:
    """The density model, on the process's own GPU where there are GPUs."""
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.zoo import as_model

    return as_model(model, PixelCNNpp, group.device, name="--model")


def _shared(group: ProcessGroup, x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``function`` of images ``x`` (N, ...), of which each process computes its share; all of it, in every process."""
    import numpy as np

    mine = np.array(group.shard(range(len(x))), dtype=int)
    parts = group.gather(function(x[mine]))
    result = np.empty((len(x), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        result[rank :: group.world_size] = part
    return result


@contextmanager
def _throughput(group: ProcessGroup, count: int, verbose: bool) -> Iterator[None]:
    """Say, beside the progress bar, how many images a second were done by all processes together."""
    began = time.perf_counter()
    yield
    if verbose and group.rank == 0:
        rate = count / (time.perf_counter() - began)
        typer.echo(f"{rate:.1f} images/s, {group.world_size} process{'es' * (group.world_size > 1)}", err=True)


def _images_or_test_images(source: str, pixel_cnn: PixelCNNpp, data_dir: Path | None) -> ImageSet:
    """A data set's test images; else those in the folder or file, an array of as many channels as the model has."""
    from art_pixeldefend import datasets
    from art_pixeldefend.image_files import ImageSet, read_images

    if source not in datasets.NAMED:
        return read_images(source, pixel_cnn.image_shape[:1])
    levels = datasets.load(source, data_dir).x_test
    return ImageSet(levels, [str(i) for i in range(len(levels))], "NCHW")


def _calibration_images(source: str, pixel_cnn: PixelCNNpp, data_dir: Path | None) -> np.ndarray:
    """Those of a data set, or of the images that the model was trained on; else all images of the folder or file."""
    from art_pixeldefend import datasets
    from art_pixeldefend.image_files import read_arrays, read_images

    if source in datasets.NAMED or (source.endswith(".npz") and "x_train" in read_arrays(source)):
        return datasets.load(source, data_dir).calibration(pixel_cnn).x
    if Path(source).is_dir() and (data := datasets.load(source)).held_out_from(pixel_cnn):
        return data.x_calibration
    return read_images(source, pixel_cnn.image_shape[:1]).levels


def _write_csv(path: Path, columns: dict) -> None:
    """Columns of one length, floats with all the digits that tell them apart."""
    import csv
    import io

    from art_pixeldefend.files import write_atomically

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(path, buffer.getvalue())


def main() -> None:
    """Run the command line; errors that the user can mend are one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
