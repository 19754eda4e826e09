import os

import numpy as np
import pytest
import torch

from art_pixeldefend import PixelCNNpp, datasets

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined: they work on a CPU then, slowly


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models this small lose more to waking threads than they gain."""
    torch.set_num_threads(1)


def random_levels(count, image_shape, seed=0):
    """Images with some structure: smooth gradients with noise, as levels."""
    rng = np.random.default_rng(seed)
    channels, height, width = image_shape
    slope = rng.normal(0, 60, (count, channels, 1, 1)) * np.linspace(-1, 1, height)[:, None]
    slope = slope + rng.normal(0, 60, (count, channels, 1, 1)) * np.linspace(-1, 1, width)
    noise = rng.normal(0, 8, (count, *image_shape))
    return np.clip(np.round(128 + slope + noise), 0, 255).astype(np.uint8)


def random_model(image_shape, seed=0, **sizes):
    """A small model with random weights, initialised from images."""
    torch.manual_seed(seed)
    model = PixelCNNpp(image_shape, **({"filters": 6, "resnets": 1, "mixtures": 3} | sizes))
    model.initialise(random_levels(32, image_shape))
    return model.eval()


@pytest.fixture(scope="session")
def make_levels():
    return random_levels


@pytest.fixture(scope="session")
def make_model():
    return random_model


@pytest.fixture(scope="session")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="session")
def digits_model():
    return PixelCNNpp.from_pretrained("digits")


def official_data(name):
    """The data set of this name, from the folder that tests are told of; a skip where it is not there."""
    if not os.environ.get(datasets.DATA_DIR_VARIABLE):
        pytest.skip(f"{datasets.DATA_DIR_VARIABLE} names no folder with {name}")
    try:
        return datasets.load(name, download=False)
    except FileNotFoundError as error:
        pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="session")
def load_official_data():
    return official_data


@pytest.fixture(scope="session")
def fashion_mnist():
    return official_data("fashion-mnist")


@pytest.fixture(scope="session")
def cifar_10():
    return official_data("cifar-10")
