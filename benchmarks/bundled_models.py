"""Make a file of ``art_pixeldefend/models/weights`` from a training run: half precision, measured, with its card.

    python benchmarks/bundled_models.py cifar-10 --run FOLDER --hardware "2 cores of ..., 3 hours"
    python benchmarks/bundled_models.py cifar-10 --name cifar-10-score --run FOLDER --hardware "..."

measures the half-precision model on all test images and writes ``NAME.safetensors`` and ``NAME.md``. Of a run that has
not finished, it takes the averaged weights of the checkpoint. If the run did not train on the data set's train split,
``--trained-on FILE`` is the .npz that it trained on, whose images must be among those of the train split.
"""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from published import DataDir

from art_pixeldefend import datasets
from art_pixeldefend.datasets import FINGERPRINT, SAMPLE, Dataset
from art_pixeldefend.files import CHECKPOINT, MODEL
from art_pixeldefend.models import checkpoint, zoo
from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.score import ScoreModel
from art_pixeldefend.models.training import Settings, as_start
from art_pixeldefend.models.zoo import WEIGHTS

TITLES = {"cifar-10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "digits": "scikit-learn's handwritten digits"}
LICENCES = {"fashion-mnist": "Fashion-MNIST is Zalando SE's, MIT licence"}
COLUMNS = ("dropout", "learning_rate", "warmup", "decay", "average", "seed")


def main(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="a data set's name")],
    run: Annotated[Path, typer.Option(help="folder of art-pixeldefend train")],
    hardware: Annotated[str, typer.Option(help="of the training, and its time, for the card")],
    name: Annotated[str | None, typer.Option(help="of the bundled model; default: the data set")] = None,
    trained_on: Annotated[Path | None, typer.Option(help=".npz that the run trained on")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="folder for the model and its card")] = WEIGHTS,
) -> None:
    """Write weights and card."""
    data, name = datasets.load(dataset, data_dir), name or dataset
    source = run / MODEL if (run / MODEL).is_file() else run / CHECKPOINT
    header = checkpoint.read_header(source)
    kind = header["model"]["kind"] if zoo.is_run(header) else zoo.kind_of(header)
    model = as_start(source, zoo.class_of(str(kind)), name="--run")
    images = training_images(model, data, trained_on)
    path = out / f"{name}.safetensors"
    if zoo.is_run(header):
        model.provenance["schedule_steps"] = header["settings"]["steps"]
    provenance = model.provenance | {"dataset": dataset, "split": "train", SAMPLE: datasets.sample(images)}
    model.save(path, dtype=torch.float16)
    model = type(model).load(path)  # with rounded weights
    results = {f"test_{key}": value for key, value in model.evaluate(torch.from_numpy(data.x_test)).items()}
    model.provenance = provenance | results
    model.save(path, dtype=torch.float16)
    text = card(name, model, data, f"{path.stat().st_size / 1e6:.1f} MB", hardware, trained_on is not None)
    path.with_suffix(".md").write_text(text)
    typer.echo(f"{name}: {', '.join(f'{value:.4f} {key}' for key, value in results.items())}")


def training_images(model: ImageModel, data: Dataset, trained_on: Path | None) -> Any:
    """The images that the model's last run was trained on: the train split, or a part of it, as those before it.

    Raises:
        typer.BadParameter: if the run's record differs from them, or some are not of the train split.
    """
    images = data.x_train if trained_on is None else datasets.load(trained_on).x_train
    last, *earlier = _chain(model.provenance)[::-1]
    allowed = {datasets.fingerprint(images), datasets.fingerprint(data.x_train)}
    if last.get(FINGERPRINT) != datasets.fingerprint(images) or {run.get(FINGERPRINT) for run in earlier} - allowed:
        raise typer.BadParameter(
            "--trained-on must name the images that the run, and those it started from, trained on"
        )
    known = {image.tobytes() for image in data.x_train}
    if not all(image.tobytes() in known for image in images):
        raise typer.BadParameter(f"--trained-on must hold images of the train split of {data.name} only")
    return images


def card(name: str, model: ImageModel, data: Dataset, size: str, hardware: str, own_file: bool) -> str:
    """The model card."""
    facts, shape = model.provenance, " x ".join(map(str, model.image_shape[1:]))
    kind, result, sizes, reproduced = KINDS[type(model)](name, model, data)
    parameters = sum(value.numel() for value in model.parameters()) / 1e6
    calibration = f'`datasets.load("{data.name}").calibration(model)`'
    if not data.held_out_from(model):
        calibration = f"the last {data.reserved:,} test images: {calibration}"
    licence = LICENCES.get(data.name)
    rows = [
        result,
        ("size", f"{sizes}; {parameters:.2f} M parameters, {size} in half precision"),
        ("trained on", f"{share(model, data)}; not on its calibration split"),
        ("calibrate with", calibration),
        ("command of the last run", f"`{train_command(model, 'FILE' if own_file else data.name)}`"),
        ("hardware, time", f"{hardware}; bundled on {date.today().isoformat()}"),
        ("reproduced by", f"`{reproduced}`"),
        *([("licence", licence)] if licence else []),
    ]  # fmt: skip
    grey = "grey" if model.image_shape[0] == 1 else "RGB"
    return f"""# {name}

{kind} of {TITLES.get(data.name, data.name)} ({shape}, {grey}).

| | |
| --- | --- |
{_lines(rows)}
Training settings{_versions(facts)}:

| run | steps | images per step | {" | ".join(column.replace("_", " ") for column in COLUMNS)} |
| {" | ".join(["--:"] * (3 + len(COLUMNS)))} |
{_lines(list(runs(model)))}
The test images were not used to select a checkpoint.
"""


def share(model: ImageModel, data: Dataset) -> str:
    """How much of the train split all runs together, and the last one, were trained on."""
    whole, last = len(data.x_train), model.provenance["training_images"]
    split = f"of the train split of `{data.name}` (`art_pixeldefend.datasets`)"
    if last == whole:
        return f"the {whole:,} images {split}"
    if datasets.fingerprint(data.x_train) in (run.get(FINGERPRINT) for run in _chain(model.provenance)):
        return f"the {whole:,} images {split}, in the last run on {last:,} of them"
    return f"{last:,} of the {whole:,} images {split}"


def _versions(facts: Mapping[str, Any]) -> str:
    return f" (version {facts['version']}, torch {facts['torch']})" if "version" in facts else ""


def _lines(rows: list[tuple]) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def runs(model: ImageModel) -> Iterator[tuple]:
    """The runs behind a model, first to last: number, steps, images per step, and further settings."""
    found = _chain(model.provenance)
    found[-1] = {"dropout": model.configuration.get("dropout", "-")} | found[-1]
    for number, run in enumerate(found, 1):
        images = run["batch_size"] * run.get("processes", 1)
        yield number, run["steps"], images, *(run.get(name, "-") for name in COLUMNS)


def _chain(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The provenance of each run behind a model, first to last."""
    found = [provenance]
    while "start" in found[0]:
        found.insert(0, found[0]["start"])
    return found


def train_command(model: ImageModel, data: str) -> str:
    """The command line of the model's last run."""
    facts, words = dict(model.provenance), ["--kind", model.kind, "--out", "run"]
    facts["steps"] = facts.get("schedule_steps", facts["steps"])  # of a run that has not finished
    for name, parameter in inspect.signature(type(model)).parameters.items():
        value = model.configuration[name]
        if name not in ("image_shape", "mean", "deviation") and value != parameter.default:
            plain = isinstance(model, PixelCNNpp)
            words += [f"--{name}", str(value)] if plain else ["--set", f"{name}={json.dumps(value)}"]
    defaults = Settings().__dict__
    words += [
        word
        for name in ("steps", "batch_size", "learning_rate", "seed", "every")
        if facts[name] != defaults[name]
        for word in (f"--{name.replace('_', '-')}", f"{facts[name]:g}" if name == "learning_rate" else str(facts[name]))
    ]
    words += ["--flip"] if facts.get("flip") else []
    words += ["--start-from", "FILE"] if "start" in facts else []
    processes = facts.get("processes", 1)
    launcher = f"torchrun --nproc-per-node {processes} -m art_pixeldefend" if processes > 1 else "art-pixeldefend"
    return f"{launcher} train {data} {shlex.join(words)}"


def density_card(name: str, model: PixelCNNpp, data: Dataset) -> tuple[str, tuple[str, str], str, str]:
    """Kind, result, sizes and command of a density model's card."""
    command = f"art-pixeldefend score {data.name} --model {name}"
    bits = f"**{model.provenance['test_bits_per_dim']:.4f} bits/dim** on all {len(data.x_test):,} test images"
    sizes = f"{model.filters} filters, {model.resnets} resnets per stage, {model.mixtures} logistic components"
    return "A PixelCNN++", ("bits per dimension", bits), sizes, command


def score_card(name: str, model: ScoreModel, data: Dataset) -> tuple[str, tuple[str, str], str, str]:
    """Kind, result, sizes and command of a score model's card."""
    errors = {key.rpartition("_")[2]: value for key, value in model.provenance.items() if key.startswith("test_rmse_")}
    shown = " / ".join(f"{value:.3f}" for value in errors.values())
    result = (
        f"root mean square **{shown}** at sigma {' / '.join(errors)}, mean over the {len(data.x_test):,} test images"
    )
    channels, blocks = (", ".join(map(str, values)) for values in (model.channels, model.blocks))
    command = f'ScoreModel.from_pretrained("{name}").evaluate(datasets.load("{data.name}").x_test)'
    kind = "A score model (noise-conditional denoiser)"
    return kind, ("denoising error", result), f"{channels} channels and {blocks} residual blocks by resolution", command


KINDS: dict[type[ImageModel], Any] = {PixelCNNpp: density_card, ScoreModel: score_card}


if __name__ == "__main__":
    typer.run(main)
