"""Measure the detector's false-positive rate with calibration and with training images, and the cost of ``fit``.

    python benchmarks/calibration.py --out benchmarks/results/calibration.json

The detector is fitted to the images that ``Dataset.calibration`` gives for a model and, as in the paper, to the first
training images of the model; clean test images give the false-positive rates. CPU time is measured on one thread, where
other work on the machine hardly changes it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from published import DataDir, command
from scipy.stats import binomtest, ks_2samp
from timing import conditions

from art_pixeldefend import PixelDefendDetector, datasets
from art_pixeldefend.detectors.conformal import conformal_p_values
from art_pixeldefend.files import write_atomically

ALPHAS = (0.01, 0.05, 0.1)


def flagged(p_values: np.ndarray, alpha: float) -> list[float]:
    """The percentage of p-values of at most alpha, and the ends of its 95% interval (Wilson)."""
    count = int((p_values <= alpha).sum())
    low, high = binomtest(count, len(p_values)).proportion_ci(method="wilson")
    return [round(100 * share, 2) for share in (count / len(p_values), low, high)]


def measure(name: str, data: datasets.Dataset, images: int, training: int) -> dict[str, Any]:
    """The rates of one model, a test of whether test and reference images score alike, and the cost of ``fit``."""
    detector = PixelDefendDetector(name, clip_values=(0, 255), verbose=True)
    test = detector.score(data.test(detector.pixel_cnn).x[:images])
    references = {
        "calibration": data.calibration(detector.pixel_cnn).x,
        "training": data.train_and_calibration().x[:training],
    }
    result: dict[str, Any] = {"test_images": len(test)}
    for reference, x in references.items():
        began = time.process_time()
        detector.fit(x, reference=reference)
        seconds = time.process_time() - began
        p_values = conformal_p_values(-test, -detector.log_likelihoods)
        result[reference] = {
            "images": len(x),
            "flagged_percent": {f"{alpha:g}": flagged(p_values, alpha) for alpha in ALPHAS},
            "kolmogorov_smirnov_p_value": float(ks_2samp(test, detector.log_likelihoods).pvalue),
            "fit_cpu_seconds": round(seconds, 2),
            "fit_images_per_cpu_second": round(len(x) / seconds, 1),
        }
    return result


def main(
    model: Annotated[list[str], typer.Option(help="density models: bundled names")] = [  # noqa: B006
        "digits",
        "fashion-mnist",
        "fashion-mnist-40x5",
    ],
    images: Annotated[int, typer.Option(min=1, help="test images, from the first on")] = 1000,
    training: Annotated[int, typer.Option(min=1, help="training images, from the first on")] = 2000,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Measure each model on its own data set and print the figures."""
    torch.set_num_threads(1)
    result = {}
    for name in model:
        data = datasets.load(next(known for known in datasets.NAMED if name.startswith(known)), data_dir)
        result[name] = measure(name, data, images, training)
    record = {"command": command("calibration.py"), **conditions(torch.device("cpu")), "result": result}
    print(json.dumps(record, indent=1))
    if out:
        write_atomically(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
