import json

import numpy as np
import pytest
import torch
from torch import nn

from art_pixeldefend import datasets
from art_pixeldefend.evaluation import runner
from art_pixeldefend.evaluation.grid import Grid, Row  # noqa: F401  # for the source below
from art_pixeldefend.evaluation.paper.grids import defences  # noqa: F401  # for the source below

# Squeezing stands for every defence: it takes no time.
SOURCE = """Grid(
    "digits",
    (Row("vgg"), Row("vgg", "normal", "feature-squeezing", "white-box"), Row("vgg", "normal", "feature-squeezing")),
    eps=(16, 40), attacks=("rand", "fgsm"), defences=defences(56, 3), models={"pixel_cnn": "digits"}, recipe="digits",
    steps=30, sizes={"vgg": {"width": 2}}, images=32, validation=8, chunk=8,
)"""


@pytest.fixture(scope="session")
def tiny() -> Grid:
    """A grid of seconds."""
    return eval(SOURCE)


@pytest.fixture(scope="session")
def run(tiny):
    """Runs a grid into a folder and returns the table."""
    return lambda out, grid=tiny: runner.run(grid, out, verbose=False).table


@pytest.fixture(scope="session")
def finished(run, tmp_path_factory):
    """The folder of a finished tiny grid."""
    out = tmp_path_factory.mktemp("grid")
    run(out)
    return out


@pytest.fixture(scope="session")
def cells():
    """Reads the results of all cells in a folder."""
    return lambda folder: [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]


@pytest.fixture(scope="session")
def source():
    """The Python source of the tiny grid."""
    return SOURCE


@pytest.fixture(scope="session")
def digits_images():
    """A few test images in [0, 1], and their classes."""
    data = datasets.load("digits")
    return data.x_test[:24].astype(np.float32) / 255, data.y_test[:24]


@pytest.fixture(scope="session")
def nearest_mean():
    """A classifier of digits without training; of class means m, it returns the logits 10 (x . m - m . m / 2)."""
    data = datasets.load("digits")
    x = torch.from_numpy(data.x_train).flatten(1) / 255
    means = torch.stack([x[torch.from_numpy(data.y_train) == c].mean(0) for c in range(10)])
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight[:], layer.bias[:] = 10 * means, -5 * means.square().sum(1)
    return nn.Sequential(nn.Flatten(), layer).eval()
