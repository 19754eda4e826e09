"""The command line ``art-pixeldefend``."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:  # the commands import what they need when they run, so that --help is fast
    from art_pixeldefend.detectors import ConformalDetector
    from art_pixeldefend.image_files import ImageSet
    from art_pixeldefend.models.base import ImageModel
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp


class Commands(TyperGroup):
    """The commands; errors that the user can correct are reported in one line, with exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command that the arguments name, and exit."""
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except typer.Abort:
            code = 130
        except Exception as error:
            if not hasattr(error, "format_message"):  # of the errors of parsing, whose classes typer does not export
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} -h)" if context else ""
            code = _report(error.format_message().rstrip(".") + hint)
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; its errors name options as they are typed, where the package names Python arguments."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, FloatingPointError) as error:
            parameters: Any = self.commands[ctx.invoked_subcommand].params
            typed = {p.name: p.opts[0] if p.opts[0].startswith("-") else p.metavar for p in parameters}
            words = r"'[^']*'|\b\w+=True\b|^\w+|\b[a-z]+_[a-z_]+\b"  # what is quoted stays as it is
            message = re.sub(words, lambda match: typed.get(match[0].removesuffix("=True"), match[0]), str(error))
            raise typer.Exit(_report(message)) from error


def _report(message: str) -> int:
    """Print an error in one line and return the exit code."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from art_pixeldefend import __version__

        typer.echo(f"art-pixeldefend {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog="Each command has examples: art-pixeldefend purify -h")
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Detect and purify adversarial images with PixelDefend."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


BUNDLED = "cifar-10, digits, fashion-mnist, fashion-mnist-40x5"
KINDS = "pixelcnnpp, score, vae"
Images = Annotated[Path, typer.Argument(metavar="IMAGES", help="a folder of images, or a .npy or .npz file (uint8)")]
ImagesOrData = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="a folder of images, a .npy or .npz file (uint8), or a data set (digits, fashion-mnist, "
        "fashion-mnist-500, cifar-10), of which the test images are used",
    ),
]
Model = Annotated[str, typer.Option(help=f"a bundled model ({BUNDLED}) or a .safetensors file")]
BatchSize = Annotated[int, typer.Option(help="images per batch; bounds the memory")]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help="digits, fashion-mnist, cifar-10, a folder of images, or an .npz file")
]
DataDir = Annotated[Path | None, typer.Option(help="folder of the official data files", envvar="ART_PIXELDEFEND_DATA")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace existing results")]
Verbose = Annotated[bool, typer.Option("--verbose/--quiet", help="show progress bars")]


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"art-pixeldefend {line}" for line in lines)])


@app.command(
    epilog=_examples(
        "train digits --out run --filters 24 --resnets 2 --steps 2500",
        "train digits --out run --kind score --set patch=1",
        "train photos/ --out run --device cuda",
        "train photos/ --out run --device cuda --resume",
    )
)
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the run: model.safetensors, metrics.jsonl, checkpoint, samples")],
    kind: Annotated[str, typer.Option(help=f"kind of model: {KINDS}")] = "pixelcnnpp",
    data_dir: DataDir = None,
    filters: Annotated[int | None, typer.Option(help="pixelcnnpp: feature maps [default: 40]")] = None,
    resnets: Annotated[int | None, typer.Option(help="pixelcnnpp: gated resnets per stage [default: 5]")] = None,
    mixtures: Annotated[int | None, typer.Option(help="pixelcnnpp: components per sub-pixel [default: 10]")] = None,
    dropout: Annotated[float | None, typer.Option(help="pixelcnnpp: dropout probability [default: 0.5]")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, any other argument of the model's class, as JSON")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="optimiser steps; the learning rate falls over the last 60 % of them")
    ] = 10_000,
    batch_size: Annotated[int, typer.Option(help="images per step and process")] = 16,
    learning_rate: Annotated[float, typer.Option(help="highest learning rate of Adam")] = 2e-3,
    flip: Annotated[bool, typer.Option("--flip", help="mirror half of the images horizontally, at random")] = False,
    seed: Annotated[int, typer.Option(help="seed of weights, order of the images, and dropout")] = 0,
    every: Annotated[int, typer.Option(help="steps between evaluations, each followed by a checkpoint")] = 1_000,
    start_from: Annotated[
        str | None,
        typer.Option(help=f"begin with the weights of a model ({BUNDLED}, or a file) or of a run's checkpoint"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="continue from the checkpoint in the folder; with more --steps, its learning rate rises to that of "
            "the longer run, and the model's provenance records the segments",
        ),
    ] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    mixed_precision: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="bf16 autocast; default: where the hardware multiplies bf16")
    ] = None,
    verbose: Verbose = True,
) -> None:
    """Train an image model.

    Several processes: torchrun --nproc-per-node 2 -m art_pixeldefend train ...

    Ctrl-C and SIGTERM end the run with a checkpoint, from which --resume continues.

    The printed results are of all test images of DATA; the calibration images are others.
    """
    import torch

    from art_pixeldefend import datasets
    from art_pixeldefend.files import SAMPLES
    from art_pixeldefend.models import training
    from art_pixeldefend.models.zoo import class_of
    from art_pixeldefend.pictures import write_sheet
    from art_pixeldefend.processes import process_group
    from art_pixeldefend.validation import check_device

    settings = training.Settings(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, every=every, flip=flip
    )
    training.check_run_folder(out, resume=resume, overwrite=overwrite)
    group = process_group()
    place, first, model_class = check_device("device", device or group.device), group.rank == 0, class_of(kind)
    sizes = {"filters": filters, "resnets": resnets, "mixtures": mixtures, "dropout": dropout}
    sizes = _model_options(model_class, {name: value for name, value in sizes.items() if value is not None}, option)
    with _argument("DATA"):
        images = datasets.load(data, data_dir)
    start = training.as_start(start_from, model_class, images.image_shape, name="--start-from") if start_from else None
    counts = f"{len(images.x_calibration)} calibration and {len(images.x_test)} test images"
    if first and verbose:
        typer.echo(f"training on {len(images.x_train)} images; held back: {counts}", err=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        shape: dict = {"image_shape": images.image_shape}
        model = model_class(**(start.configuration if start else {}) | sizes | shape)
        if start is None:
            model.initialise(images.x_train[:100])
    training.train(
        model, model_class.loss, images.x_train, settings, out, held_out=images.x_test, evaluate=model_class.evaluate,
        start=start, provenance={"dataset": data, "split": "train"} if data in datasets.NAMED else {}, resume=resume,
        overwrite=overwrite, device=place, mixed_precision=mixed_precision, verbose=verbose,
    )  # fmt: skip
    sample = getattr(model, "sample", None)
    if first and sample and model.image_shape[0] in (1, 3):
        write_sheet(out / SAMPLES, sample(16, seed=seed).cpu().numpy())
    if first:
        results = {name[5:]: value for name, value in model.provenance.items() if name.startswith("test_")}
        shown = [f"{value:.4f} {name.replace('_per_', '/')}" for name, value in results.items()]
        measured = f"{', '.join(shown)} on all test images" if shown else "trained"
        typer.echo(f"{measured}; held back from training: {counts}")


@app.command(
    epilog=_examples(
        "purify attacked/ purified/ --model fashion-mnist --eps 32",
        "purify attacked.npy purified.npy --model model.safetensors",
    )
)
def purify(
    images: Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a folder if IMAGES is one, else a .npy or .npz file")],
    model: Model,
    eps: Annotated[int, typer.Option(help="largest change of a pixel, in levels 0..255")] = 16,
    threshold: Annotated[float, typer.Option(help="bits/dim below which an image is left unchanged")] = 0.0,
    batch_size: BatchSize = 128,
    device: Device = None,
    overwrite: Overwrite = False,
    verbose: Verbose = True,
) -> None:
    """Purify images with PixelDefend: replace each pixel by the most likely value within EPS of it.

    A folder becomes a folder of PNG files of the same names, an array becomes an array of the same layout.

    Several processes share the images: torchrun --nproc-per-node 2 -m art_pixeldefend purify ...
    """
    from art_pixeldefend import AdaptivePixelDefend, PixelDefend, datasets
    from art_pixeldefend.image_files import check_target, write_images
    from art_pixeldefend.models.pixelcnnpp.decoders import load_engine
    from art_pixeldefend.processes import process_group

    group, pixel_cnn = process_group(), _density_model(model, device)
    found = datasets.read(images, pixel_cnn, exclude=out)
    check_target(out, found, overwrite=overwrite)
    options: dict = {"batch_size": batch_size, "verbose": verbose and group.rank == 0}
    if threshold:
        defence = AdaptivePixelDefend((0, 255), eps, pixel_cnn, threshold=threshold, **options)
    else:  # without computing likelihoods
        defence = PixelDefend((0, 255), eps, pixel_cnn, **options)
    load_engine(pixel_cnn, defence.method, verbose=verbose and group.rank == 0)  # compiles before the clock starts
    purified = group.map(lambda x: defence(x)[0], found.levels, verbose=verbose)
    if group.rank == 0:
        write_images(out, purified, like=found, overwrite=overwrite)
        typer.echo(f"{len(purified)} images purified into {out}")


@app.command(
    epilog=_examples(
        "score fashion-mnist --model fashion-mnist",
        "score photos/ --model model.safetensors --out scores.csv",
    )
)
def score(
    images: ImagesOrData,
    model: Model,
    out: Annotated[Path | None, typer.Option(help="CSV file for the bits/dim of each image", dir_okay=False)] = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 128,
    device: Device = None,
    overwrite: Overwrite = False,
    verbose: Verbose = True,
) -> None:
    """Print the mean bits per dimension of images under a density model.

    Several processes share the images: torchrun --nproc-per-node 2 -m art_pixeldefend score ...
    """
    from art_pixeldefend import PixelDefendDetector, datasets
    from art_pixeldefend.files import check_file, write_csv
    from art_pixeldefend.processes import process_group

    if out:
        check_file(out, overwrite=overwrite)
    group, pixel_cnn = process_group(), _density_model(model, device)
    found = datasets.read(images, pixel_cnn, data_dir)
    if not len(found.levels):
        raise ValueError(f"IMAGES must hold at least one image, {images!r} holds none")
    shown = verbose and group.rank == 0
    detector = PixelDefendDetector(pixel_cnn, (0, 255), batch_size=batch_size, verbose=shown)
    bits = group.map(detector.bits_per_dim, found.levels, verbose=verbose)
    if group.rank == 0:
        if out:
            write_csv(out, {"image": found.names, "bits_per_dim": bits})
        _summarise(f"{bits.mean():.4f} bits/dim, mean of {len(bits)} images", out)


Models = Annotated[
    list[str],
    typer.Option(help=f"a bundled model ({BUNDLED}, digits-score, ...) or a .safetensors file; may be repeated"),
]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        help="likelihood, likelihood-ratio, complexity[:png|zlib], score-norm[:SIGMA] or denoising-error[:SIGMA], of "
        "the models of the kinds that it needs; may be repeated [default: likelihood, as in the paper]"
    ),
]
Combine = Annotated[str, typer.Option(help="of several scores: bonferroni, harmonic, cauchy or joint")]


@app.command(
    epilog=_examples(
        "detect x.npy --model digits --calibration digits --out p.csv",
        "detect x.npy --model digits --likelihoods c.st --out p.csv",
    )
)
def detect(
    images: ImagesOrData,
    model: Models,
    out: Annotated[
        Path, typer.Option(help="CSV file: image, p_value, bits_per_dim or scores, adversarial", dir_okay=False)
    ],
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
        typer.Option(
            help="keep the scores of these images in this file, and use it if it exists; calibrate writes it, too",
            dir_okay=False,
        ),
    ] = None,
    score: Scores = None,
    combine: Combine = "bonferroni",
    alpha: Annotated[float, typer.Option(help="call an image adversarial up to this p-value")] = 0.05,
    fdr: Annotated[
        float | None,
        typer.Option(
            help="instead of --alpha: the largest expected share of clean images among those called adversarial"
        ),
    ] = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 128,
    device: Device = None,
    overwrite: Overwrite = False,
    verbose: Verbose = True,
) -> None:
    """Test whether images are adversarial: p-values and scores, as CSV.

    Images are compared with clean ones of the same kind. If --calibration names a data set or the folder that the
    models were trained on, only images that no model has seen are used. From any other folder or file all are used.
    Images of a folder or a .npy file are read in batches, so that the memory does not grow with their number.

    --fdr uses the Benjamini-Hochberg procedure for one score, and Benjamini-Yekutieli's for several.
    """
    import numpy as np

    from art_pixeldefend import datasets
    from art_pixeldefend.detectors.conformal import flagged_by_rate
    from art_pixeldefend.files import check_file, write_csv
    from art_pixeldefend.validation import check_rate

    check_file(out, overwrite=overwrite)
    if likelihoods and not likelihoods.exists():
        check_file(likelihoods)
    if calibration and training:
        raise ValueError("--calibration and --training must not both be given")
    if not (calibration or training or (likelihoods and likelihoods.exists())):
        raise ValueError("--calibration must name images that the model was not trained on")
    if training and score:
        raise ValueError("--training must not be given with --score: use --calibration")
    if fdr is not None:
        check_rate("--fdr", fdr)
    detector = _detector(model, score, combine, alpha, device, batch_size=batch_size, verbose=verbose)
    found = datasets.open_stream(images, *detector.models(), data_dir=data_dir)
    if likelihoods and likelihoods.exists():
        detector.load(likelihoods)
        for reference, source in (("calibration", calibration), ("training", training)):
            if source and reference != detector.reference:
                raise ValueError(f"--likelihoods {likelihoods} holds those of {detector.reference} images")
            if source:
                typer.echo(f"--{reference} {source} is not read: {likelihoods} holds the likelihoods", err=True)
    elif calibration:
        _calibrate("--calibration", detector, calibration, data_dir)
    elif training:
        with _argument("--training"):
            detector.fit(datasets.load(training, data_dir).train_and_calibration().x, reference="training")
    if likelihoods and not likelihoods.exists():
        detector.save(likelihoods)
    columns: dict[str, list] = {"image": list(found.names), "p_value": []}
    if score is None:
        columns["bits_per_dim"] = []
    else:
        columns |= {name: [] for name in score} | {f"p_value of {name}": [] for name in score}
    columns["adversarial"] = []
    for report, flagged in detector.detect_stream(found.batches(batch_size), total=len(found.names)):
        columns["p_value"] += report["p_values"].tolist()
        columns["adversarial"] += flagged.astype(int).tolist()
        if score is None:
            columns["bits_per_dim"] += report["bits_per_dim"].tolist()
        for k, name in enumerate(score or ()):
            columns[name] += report["scores"][:, k].tolist()
            columns[f"p_value of {name}"] += report["score_p_values"][:, k].tolist()
    if fdr is not None:
        scores = np.transpose([columns[name] for name in score or ["bits_per_dim"]])
        method = "by" if len(score or ()) > 1 else "bh"
        q_values, flagged = flagged_by_rate(np.array(columns["p_value"]), scores, fdr, method)
        columns["adversarial"] = flagged.astype(int).tolist()
        columns["q_value"] = q_values.tolist()
    write_csv(out, columns)
    assert detector.calibration_scores is not None
    level = f"level {alpha:g}" if fdr is None else f"a false discovery rate of {fdr:g}"
    _summarise(
        f"{sum(columns['adversarial'])} of {len(found.names)} images are adversarial at {level}, compared with "
        f"{len(detector.calibration_scores)} {detector.reference} images; see {out}",
        out,
    )


@app.command(
    epilog=_examples(
        "calibrate digits --model digits --out c.st --report c.html",
        "calibrate photos/ --model m.safetensors --out c.st",
    )
)
def calibrate(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="clean images that the models were not trained on: a data set, a folder, .npy or .npz",
        ),
    ],
    model: Models,
    out: Annotated[Path, typer.Option(help="file for the images' scores, for detect --likelihoods", dir_okay=False)],
    report: Annotated[
        Path | None, typer.Option(help="HTML page: scores, realised false-alarm rate, images", dir_okay=False)
    ] = None,
    score: Scores = None,
    combine: Combine = "bonferroni",
    alpha: Annotated[float, typer.Option(help="the false-alarm rate that the detector is for")] = 0.05,
    data_dir: DataDir = None,
    batch_size: BatchSize = 128,
    device: Device = None,
    overwrite: Overwrite = False,
    verbose: Verbose = True,
) -> None:
    """Calibrate a detector on clean images, and report how often it flags clean images.

    If IMAGES names a data set or the folder that the models were trained on, only images that no model has seen are
    used. From any other folder or file all are used.
    """
    from art_pixeldefend.detectors.false_alarms import false_alarms
    from art_pixeldefend.files import check_file

    for path in (out, report):
        if path:
            check_file(path, overwrite=overwrite)
    detector = _detector(model, score, combine, alpha, device, batch_size=batch_size, verbose=verbose)
    found = _calibrate("IMAGES", detector, images, data_dir)
    detector.save(out)
    if report:
        from art_pixeldefend.evaluation.calibration_report import write_report

        write_report(
            report, detector, found, title=f"Calibration on {Path(images).name}", names=score or ["likelihood"]
        )
    measured = false_alarms(detector, [alpha])
    shown = f"{measured[0].rate:.1%} of clean images flagged" if measured else "too few images to measure false alarms"
    typer.echo(f"calibrated on {len(found.levels)} images; {shown} at level {alpha:g} on halves of them; see {out}")


@app.command(
    epilog=_examples(
        "sample --model fashion-mnist --out samples.png",
        "sample --model model.safetensors --out samples.npy --count 100",
    )
)
def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="a PNG file with all images, or an array (.npy, .npz)", dir_okay=False)],
    count: Annotated[int, typer.Option(help="number of images", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw images from a density model."""
    from art_pixeldefend.files import check_file
    from art_pixeldefend.image_files import ImageSet, write_images
    from art_pixeldefend.pictures import write_sheet

    if out.suffix not in (".png", ".npy", ".npz"):
        raise ValueError(f"--out must end in .png, .npy or .npz, got {str(out)!r}")
    check_file(out, overwrite=overwrite)
    pixel_cnn = _density_model(model, device)
    if out.suffix == ".png" and pixel_cnn.image_shape[0] not in (1, 3):
        raise ValueError(f"--out must end in .npy or .npz for images of {pixel_cnn.image_shape[0]} channels")
    levels = pixel_cnn.sample(count, seed=seed).cpu().numpy()
    if out.suffix == ".png":
        write_sheet(out, levels)
    else:
        write_images(out, levels, like=ImageSet(levels, (), "NCHW"), overwrite=overwrite)
    typer.echo(f"{count} samples in {out}")


@app.command(
    epilog=_examples(
        "evaluate fashion-mnist-500 --classifier fashion-mnist-resnet",
        "evaluate x.npz --classifier net.pt --defence DeepImagePrior",
        "evaluate digits --classifier mine:Net --weights w.safetensors",
    )
)
def evaluate(
    data: Data,
    classifier: Annotated[
        str,
        typer.Option(help="a bundled classifier, a TorchScript file, or MODULE:FUNCTION: [0, 1] images to logits"),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="state_dict of MODULE:FUNCTION, a .safetensors file", dir_okay=False)
    ] = None,
    defence: Annotated[str, typer.Option(help="none, a purifier of this package, or an ART class's path")] = "none",
    option: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, an argument of the defence, as JSON or text")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="radius: levels of 255 for Linf, by default 8; in the range 0..1 for L2")
    ] = None,
    norm: Annotated[str, typer.Option(help="Linf or L2")] = "Linf",
    budget: Annotated[str, typer.Option(help="quick for development; standard or full to report")] = "quick",
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 100,
    baseline: Annotated[
        Path | None,
        typer.Option(help="result of an adversarially trained classifier without a defence, by --out", dir_okay=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result", dir_okay=False)] = None,
    folder: Annotated[Path | None, typer.Option(help="keeps finished attacks, so that a stopped run continues")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 256,
    overwrite: Overwrite = False,
    verbose: Verbose = True,
) -> None:
    """Attack a classifier behind a defence, print the accuracy that is left, and what it cannot claim.

    The defence's arguments follow it: --defence PixelDefend --set eps=32 --set pixel_cnn=fashion-mnist
    """
    from art_pixeldefend import classifiers, datasets, purifiers
    from art_pixeldefend.evaluation import Evaluation, evaluate_robustness
    from art_pixeldefend.evaluation.preprocessors import preprocessor
    from art_pixeldefend.files import check_file
    from art_pixeldefend.levels import UNIT, from_levels
    from art_pixeldefend.validation import check_count

    if out:
        check_file(out, overwrite=overwrite)
    check_count("images", images)
    with _argument("DATA"):
        found = datasets.load(data, data_dir)
    x, y = from_levels(found.x_test[:images], UNIT), found.y_test[:images]
    if ":" in classifier:
        sys.path.insert(0, str(Path.cwd()))  # for MODULE:FUNCTION
    model = classifiers.load_module(classifier, weights)
    path = f"{purifiers.__name__}.{defence}" if defence in purifiers.__all__ else defence
    purifier = None if defence == "none" else preprocessor([(path, _assignments(option))])
    if eps is None and norm == "L2":
        raise ValueError("--eps must be given for L2")
    if eps is not None and norm == "Linf" and 0 < eps < 1:
        raise ValueError(f"--eps must be in levels of 0..255 for Linf, got {eps:g}; for 8/255 pass 8")
    radius = (8.0 if eps is None else eps) / (255 if norm == "Linf" else 1)
    others = found.x_train if len(found.x_train) else found.x_test[images:]
    if not len(others) and budget != "quick":
        typer.echo("DATA has no other images than those evaluated: no attack uses a surrogate", err=True)
    result = evaluate_robustness(
        model, purifier, x, y, eps=radius, norm=norm, budget=budget, folder=folder,
        surrogate_images=from_levels(others[:1000], UNIT) if len(others) else None,
        baseline=None if baseline is None else Evaluation.load(baseline), seed=seed, batch_size=batch_size,
        verbose=verbose,
    )  # fmt: skip
    if out:
        result.save(out)
    _summarise(str(result), out)


@app.command(epilog=_examples("demo", "demo --data digits --out digits --seed 1"))
def demo(
    out: Annotated[Path, typer.Option(help="folder for report.html and results.json")] = Path("demo"),
    data: Annotated[str, typer.Option(help="fashion-mnist or digits")] = "fashion-mnist",
    seed: Annotated[int, typer.Option(help="seed of attacks and defences, and of the classifier of digits")] = 0,
    overwrite: Overwrite = False,
    verbose: Verbose = True,
) -> None:
    """Attack a classifier, purify and detect the images, attack through the defences; write a report with pictures.

    It takes about a minute on two cores and downloads nothing.
    """
    from art_pixeldefend.evaluation.demo import run
    from art_pixeldefend.files import check_folder

    check_folder(out, overwrite=overwrite)
    with _argument("--data"):
        typer.echo(run(out, name=data, seed=seed, verbose=verbose))
    typer.echo(f"open in a browser: {(out / 'report.html').resolve()}")


@app.command(
    epilog=_examples(
        "grid digits --out table",
        "grid fashion-mnist --out table --limit 1000 --dry-run",
    )
)
def grid(
    name: Annotated[str, typer.Argument(metavar="GRID", help="fashion-mnist, cifar-10 or digits")],
    out: Annotated[Path, typer.Option(help="folder for the table and its results; finished cells are reused")],
    model: Annotated[str | None, typer.Option(help="density model: a bundled name or a .safetensors file")] = None,
    rows: Annotated[
        str | None, typer.Option(help="only rows with one of these comma-separated words; !WORD: rows without it")
    ] = None,
    attacks: Annotated[str | None, typer.Option(help="only these comma-separated attacks")] = None,
    limit: Annotated[int | None, typer.Option(help="number of test images")] = None,
    starts: Annotated[
        int, typer.Option(help="random restarts of L-BFGS-B per image in Figure 5 (paper: 100; 0 skips the figure)")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="compute nothing; say how much is stored and how much is not")
    ] = False,
    data_dir: DataDir = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the table of another grid; finished cells are kept")
    ] = False,
    verbose: Annotated[
        bool | None,
        typer.Option("--verbose/--quiet", help="show progress bars (the default); with --dry-run, list every cell"),
    ] = None,
) -> None:
    """Regenerate the paper's table of a data set: classifiers, attacks and defences.

    An interrupted run continues where it stopped. Several processes share the cells:
    torchrun --nproc-per-node 2 -m art_pixeldefend grid ...
    """
    import torch

    from art_pixeldefend.evaluation.paper.reproduce import reproduce

    if model:
        _density_model(model)  # report errors now, not after hours of training
    if name == "digits":
        torch.set_num_threads(1)  # as for the demo
    typer.echo(
        reproduce(
            name, out, data_dir=data_dir, pixel_cnn=model, rows=rows, attacks=attacks, limit=limit,
            dry_run=dry_run, starts=starts, overwrite=overwrite, verbose=not dry_run if verbose is None else verbose,
        )
    )  # fmt: skip


def _model_options(model_class: type[ImageModel], given: dict, assignments: list[str] | None) -> dict:
    """Arguments of a model's constructor, ``given`` and from NAME=VALUE texts."""
    import inspect

    given = given | _assignments(assignments)
    known = [name for name in inspect.signature(model_class).parameters if name != "image_shape"]
    for name in given:
        if name not in known:
            raise ValueError(f"{name} is not an option of {model_class.kind} models; they have {', '.join(known)}")
    return given


def _assignments(texts: list[str] | None) -> dict[str, Any]:
    """Arguments from NAME=VALUE texts; what is not JSON is text, lists are tuples."""
    import json

    given = {}
    for text in texts or ():
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"--set must be NAME=VALUE, got {text!r}")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        given[name.replace("-", "_")] = tuple(parsed) if isinstance(parsed, list) else parsed
    return given


def _detector(
    model: list[str], score: list[str] | None, combine: str, alpha: float, device: str | None, **options: Any
) -> ConformalDetector:
    """The detector of these scores; the paper's, whose files hold log-likelihoods, if none is given."""
    from art_pixeldefend.detectors import ConformalDetector, PixelDefendDetector
    from art_pixeldefend.detectors.named import score_named
    from art_pixeldefend.models import zoo
    from art_pixeldefend.validation import check_device

    if score is None:
        if len(model) > 1:
            raise ValueError("--model must be a single density model without --score")
        return PixelDefendDetector(_density_model(model[0], device), (0, 255), alpha=alpha, **options)
    place = check_device("device", device) if device else None
    models = []
    for name in model:
        try:
            models.append(zoo.load(name, place))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"--model must be a bundled model or a model's file: {error}") from error
    scores = [score_named(text, models) for text in score]
    if len(set(score)) < len(score):
        raise ValueError(f"--score must not be given twice for the same score, got {', '.join(score)}")
    return ConformalDetector(scores, combine, alpha, clip_values=(0, 255), **options)


def _calibrate(option: str, detector: ConformalDetector, source: str, data_dir: Path | None) -> ImageSet:
    """Fit a detector to those images of ``source`` that no model was trained on, and return them."""
    from art_pixeldefend import datasets

    with _argument(option):
        found = datasets.read_calibration(source, *detector.models(), data_dir=data_dir)
        if found.total and len(found.levels) < detector.least_images():
            raise ValueError(
                f"name must hold at least {detector.least_images()} images for calibration at alpha "
                f"{detector.alpha:g}: of the {found.total} images of {source!r} only {len(found.levels)} are for it, "
                "the others are for training or tests"
            )
        detector.fit(found.levels)
    return found


def _density_model(model: str, device: str | None = None) -> PixelCNNpp:
    from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
    from art_pixeldefend.models.zoo import as_model
    from art_pixeldefend.processes import process_group
    from art_pixeldefend.validation import check_device

    return as_model(model, PixelCNNpp, check_device("device", device or process_group().device), name="--model")


@contextmanager
def _argument(option: str) -> Iterator[None]:
    """Name the option in errors about the arguments ``x`` and ``name`` of the package's functions."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"^(x|name)\b", option, str(error))) from error


def _summarise(text: str, out: Path | None) -> None:
    """Print a result; not among the lines of a table that is written to the standard output."""
    from art_pixeldefend.files import is_standard_output

    typer.echo(text, err=out is not None and is_standard_output(out))


def main() -> None:
    """Run the command line."""
    app()
