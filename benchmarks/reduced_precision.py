"""Compare decoding in bfloat16 with decoding in float32.

    python benchmarks/reduced_precision.py --images 1000 --classifier resnet.safetensors --out out.json

Test images with random noise are purified by the model in float32 and by ``pixel_cnn.bfloat16()``. The result holds the
shares of sub-pixels and of images that differ, both results' bits per dimension under the float32 model, the
classifier's accuracy on them, and the times.
"""

from __future__ import annotations

import copy
import json
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from published import DataDir, command

from art_pixeldefend import PixelCNNpp, classifiers, datasets, greedy_decode
from art_pixeldefend.evaluation import runner
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models.zoo import as_model


def purified(model: PixelCNNpp, x: np.ndarray, eps: int) -> tuple[np.ndarray, float]:
    """Purify with the engine that supports any precision: levels (N, C, H, W) and seconds."""
    greedy_decode(model, x[:8], eps, "cached")
    began = time.perf_counter()
    return greedy_decode(model, x, eps, "cached", batch_size=256, verbose=True), time.perf_counter() - began


def compare(model: PixelCNNpp, x: np.ndarray, y: np.ndarray, eps: int, classifier: Path | None) -> dict[str, Any]:
    """Measures of both results and of their difference."""
    network = classifiers.as_art(classifiers.load(classifier)) if classifier else None
    levels, facts = {}, {}
    for name, decoder in (("float32", model), ("bfloat16", copy.deepcopy(model).bfloat16())):
        levels[name], seconds = purified(decoder, x, eps)
        facts[name] = {"seconds": round(seconds, 2), "bits_per_dim": float(model.bits_per_dim(levels[name]).mean())}
        if network is not None:
            facts[name]["accuracy"] = classifiers.accuracy(network, levels[name].astype(np.float32) / 255, y)
    differs = levels["float32"] != levels["bfloat16"]
    return facts | {
        "sub_pixels_that_differ": float(differs.mean()),
        "images_that_differ": float(differs.any(axis=(1, 2, 3)).mean()),
        "mean_difference_in_levels": float(np.abs(levels["float32"].astype(int) - levels["bfloat16"]).mean()),
    }


def main(
    images: Annotated[int, typer.Option(help="test images, from the first on")] = 1000,
    model: Annotated[str, typer.Option(help="density model: a bundled name or a path")] = "fashion-mnist",
    data: Annotated[str, typer.Option(help="data set: a name or a path")] = "fashion-mnist",
    data_dir: DataDir = None,
    classifier: Annotated[Path | None, typer.Option(help="file written by classifiers.save")] = None,
    eps: Annotated[int, typer.Option(help="radius of the purification, in levels")] = 32,
    noise: Annotated[int, typer.Option(help="largest noise added to a pixel, in levels")] = 8,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Decode in both precisions and compare."""
    pixel_cnn = as_model(model, PixelCNNpp, name="--model")
    test = datasets.load(data, data_dir)
    clean = test.x_test[:images].astype(int)
    shift = np.random.default_rng(0).integers(-noise, noise + 1, clean.shape)
    x = np.clip(clean + shift, 0, 255).astype(np.uint8)
    result = {
        "command": command("reduced_precision.py"),
        "date": date.today().isoformat(), "hardware": runner.hardware(), "threads": torch.get_num_threads(),
        "model": Path(model).name, "data": Path(data).name, "images": len(x), "eps": eps, "noise": noise,
    } | compare(pixel_cnn, x, test.y_test[:images], eps, classifier)  # fmt: skip
    typer.echo(json.dumps(result, indent=1))
    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
