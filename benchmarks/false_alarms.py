"""Measure how often the detector flags harmless images: clean ones, JPEG files, one level of noise, constants.

    python benchmarks/false_alarms.py --out benchmarks/results/false-alarms.json

The detector is calibrated on images that the density model has not seen, and tested on others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from published import DataDir, facts_of_run

from art_pixeldefend import PixelDefendDetector, datasets
from art_pixeldefend.files import write_atomically
from art_pixeldefend.pictures import as_picture


def jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    """Levels (N, C, H, W), saved as JPEG files and read again."""
    result = []
    for image in x:
        file = io.BytesIO()
        Image.fromarray(as_picture(image)).save(file, "JPEG", quality=quality)
        result.append(np.asarray(Image.open(file)).reshape(*image.shape[1:], -1).transpose(2, 0, 1))
    return np.stack(result)


def noise(x: np.ndarray) -> np.ndarray:
    """Levels with uniform noise of -1, 0 or 1 level."""
    shift = np.random.default_rng(0).integers(-1, 2, x.shape)
    return np.clip(x.astype(int) + shift, 0, 255).astype(np.uint8)


def constants(x: np.ndarray) -> np.ndarray:
    """As many images as ``x`` holds, each of one level."""
    return np.full(x.shape, np.arange(len(x)).reshape(-1, 1, 1, 1) % 256, np.uint8)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clean": lambda x: x,
    "JPEG, quality 95": lambda x: jpeg(x, 95),
    "JPEG, quality 75": lambda x: jpeg(x, 75),
    "noise of one level": noise,
    "constant images": constants,
    "a black image": lambda x: np.zeros_like(x[:1]),
}


def main(
    model: Annotated[str, typer.Option(help="density model: a bundled name or a path")] = "fashion-mnist",
    data: Annotated[str, typer.Option(help="data set: a name or a path")] = "fashion-mnist",
    images: Annotated[int, typer.Option(min=1, help="test images, from the first on")] = 1000,
    alpha: Annotated[float, typer.Option(help="significance level")] = 0.05,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Print the share of images flagged and the median p-value for each change."""
    source = datasets.load(data, data_dir)
    detector = PixelDefendDetector(model, clip_values=(0, 255), alpha=alpha)
    calibration = source.calibration(detector.pixel_cnn).x
    x = source.test(detector.pixel_cnn).x[:images]
    detector.fit(calibration)
    found = {}
    for name, change in CHANGES.items():
        report, flagged = detector.detect(change(x))
        found[name] = {
            "flagged_percent": round(100 * float(flagged.mean()), 2),
            "median_p": float(np.median(report["p_values"])),
        }
    result = {
        **facts_of_run("false_alarms.py"), "model": Path(model).name, "data": Path(data).name, "alpha": alpha,
        "calibration_images": len(calibration), "images": len(x), "changes": found,
    }  # fmt: skip
    typer.echo(json.dumps(result, indent=1))
    if out:
        write_atomically(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
