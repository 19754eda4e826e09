"""Make the classifiers of ``art_pixeldefend/classifiers/weights``: Fashion-MNIST, normal and adversarially trained.

    OMP_NUM_THREADS=1 python benchmarks/bundled_classifiers.py --work FOLDER

writes ``fashion-mnist-resnet``, the ResNet of ``results/fashion-mnist.md`` from that table's folder (trained first if
it is not there), and ``fashion-mnist-resnet-pgd-8`` and ``-25``, which continue from a normal one, each with its card.
"""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from published import PLACES, DataDir, Work, command, table_grid

from art_pixeldefend import classifiers, datasets
from art_pixeldefend.classifiers.networks import WEIGHTS
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.grid import Row
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.evaluation.store import Store

NORMAL, ROW = "fashion-mnist-resnet", Row("resnet", "normal")
RECIPE = classifiers.Recipe(steps=500, learning_rate=0.05, weight_decay=1e-4)
RADII = (8, 25)
PLACES |= {"--start": "FILE", "--out": "FOLDER"}


def store(name: str, network: Any, provenance: dict[str, Any], data: datasets.Dataset, out: Path) -> None:
    """Write a classifier in half precision, and its card."""
    path = out / f"{name}.safetensors"
    classifiers.save(path, network, dtype=torch.float16)
    x = data.x_test.astype(np.float32) / 255
    accuracy = classifiers.accuracy(classifiers.as_art(classifiers.load(path)), x, data.y_test)
    provenance |= {
        "dataset": "fashion-mnist", "accuracy": accuracy, "date": date.today().isoformat(),
        "hardware": runner.hardware(),
    }  # fmt: skip
    classifiers.save(path, network, provenance, dtype=torch.float16)
    path.with_suffix(".md").write_text(card(name, provenance, path.stat().st_size))
    print(f"{name}: {100 * accuracy:.2f} % of {len(x):,} test images", flush=True)


def card(name: str, facts: dict[str, Any], size: int) -> str:
    """The card of a classifier."""
    seconds = f"; {facts['cpu_seconds']:.0f} CPU seconds" if facts["cpu_seconds"] else ""
    how, limits = f"the quick recipe, {facts['steps']:,} steps of {facts['batch_size']} images", ""
    if "delta" in facts:
        attack = f"three quarters of every batch attacked by PGD within {facts['delta']} levels, 2 steps, random start"
        how = f"from {facts['start']}: {facts['steps']:,} steps of {facts['batch_size']} images, {attack}"
        limits = "A short run of adversarial training: more steps and a wider network raise both accuracies.\n"
    return f"""# {name}

A classifier of Fashion-MNIST (28 x 28, grey): the ResNet with 62 layers of PixelDefend's Appendix C, from images in
[0, 1] to logits.

| | |
| --- | --- |
| accuracy | **{100 * facts["accuracy"]:.2f} %** of the 10,000 test images |
| trained on | {facts["split"]} |
| training | {how}{seconds} |
| command | `{facts["command"]}` |
| hardware, date | {facts["hardware"]}, {facts["date"]} |
| size | {size / 1000:.0f} kB in half precision |

Accuracies under attack: `benchmarks/results/adaptive-evaluation.md`.
{limits}"""


def main(
    work: Work,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="folder for the classifiers")] = WEIGHTS,
    normal: Annotated[bool, typer.Option(help="write the normal classifier")] = True,
    radii: Annotated[list[int], typer.Option(help="of adversarial training, in levels")] = list(RADII),  # noqa: B006
    start: Annotated[Path | None, typer.Option(help="another normal classifier to continue from")] = None,
) -> None:
    """Train what is missing and write weights and cards."""
    data, line = datasets.load("fashion-mnist", data_dir), command("bundled_classifiers.py")
    if normal:
        stages = Stages(table_grid("fashion-mnist"), data, Store(work), verbose=True)
        began, trained = time.process_time(), stages.trained(ROW)
        network, recipe = stages.model(ROW), stages.recipe(ROW)
        seconds = None if trained else round(time.process_time() - began, 1)
        count, left_out = len(stages.splits["train"][0]), stages.grid.validation
        split = f"{count:,} of the official training images, all but the last {left_out}"
        facts = {"command": line, "steps": recipe.steps, "batch_size": recipe.batch_size}
        store(NORMAL, network, facts | {"split": split, "cpu_seconds": seconds}, data, out)
    split = f"the {len(data.x_train):,} images of the train split (`art_pixeldefend.datasets`)"
    for delta in radii:
        network = classifiers.load(start or out / f"{NORMAL}.safetensors")
        began = time.process_time()
        classifiers.train(
            network, data.x_train, data.y_train, RECIPE, "adversarial-pgd", delta=delta, seed=delta, verbose=True
        )
        seconds = time.process_time() - began
        facts = {"command": line, "steps": RECIPE.steps, "batch_size": RECIPE.batch_size, "delta": delta}
        facts |= {"split": split, "cpu_seconds": round(seconds, 1)}
        facts |= {"start": "a ResNet of the quick recipe on all 60,000 official training images" if start else NORMAL}
        store(f"{NORMAL}-pgd-{delta}", network, facts, data, out)


if __name__ == "__main__":
    typer.run(main)
