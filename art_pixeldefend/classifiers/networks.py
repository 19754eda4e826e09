"""Build, save and load the paper's networks, and wrap them for ART."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import Preprocessor
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend.classifiers.layers import Network
from art_pixeldefend.classifiers.resnet import ResNet
from art_pixeldefend.classifiers.vgg import VGG
from art_pixeldefend.models import checkpoint

NETWORKS: dict[str, type[Network]] = {"resnet": ResNet, "vgg": VGG}


def build(
    network: str, image_shape: tuple[int, int, int], classes: int = 10, *, seed: int = 0, **sizes: Any
) -> Network:
    """Build a network with random weights.

    Args:
        network: ``"resnet"`` or ``"vgg"``.
        image_shape: (C, H, W).
        classes: the number of classes.
        seed: of the initial weights.
        sizes: further arguments of the network; by default the paper's for grey or colour images.

    Raises:
        ValueError: for an unknown network or size.

    Example:
        >>> network = build("resnet", (1, 28, 28), units=1)
        >>> network(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    width = 4 if image_shape[0] == 1 else 16
    configuration = {"image_shape": tuple(image_shape), "classes": classes, "width": width} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = NETWORKS[network](**configuration)
        except TypeError as error:
            raise ValueError(f"sizes must be arguments of {network}: {error}") from None
    model.network, model.configuration = network, configuration  # what save() writes
    return model


def as_art(
    model: Network, defences: Preprocessor | list[Preprocessor] | None = None, **arguments: Any
) -> PyTorchClassifier:
    """Wrap a network as an ART classifier of images in [0, 1], in evaluation mode.

    Args:
        model: a network that :func:`build` made.
        defences: preprocessing defences in front of it.
        arguments: further arguments of :class:`PyTorchClassifier`.
    """
    # A third faster on a CPU, and equal up to rounding. (torch's annotations lack the argument.)
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=model.configuration["image_shape"],
        nb_classes=model.configuration["classes"],
        clip_values=(0.0, 1.0),
        preprocessing_defences=defences,
        **arguments,
    )


def accuracy(classifier: PyTorchClassifier, x: np.ndarray, y: np.ndarray, batch_size: int = 500) -> float:
    """The fraction of images (N, C, H, W) in [0, 1] that are classified as their class numbers (N,) say."""
    return float((classifier.predict(x, batch_size=batch_size).argmax(axis=1) == y).mean())


def save(path: str | PathLike[str], model: Network, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a network that :func:`build` made as safetensors, with its configuration in the header, atomically.

    Args:
        path: the file to write.
        model: the network.
        provenance: how it was trained; JSON-serialisable.

    Raises:
        OSError: if the file cannot be written.
    """
    header = {"network": model.network, "configuration": model.configuration, "provenance": dict(provenance or {})}
    checkpoint.write(path, model.state_dict(), header)


def load(path: str | PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Read a network that :func:`save` wrote, in evaluation mode, and its provenance. Nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, corrupted, or holds something else.
    """
    tensors, header = checkpoint.read(path)
    try:
        model = build(header["network"], **header["configuration"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path {str(path)!r} is not a file of a classifier: {error}") from error
    return model.eval(), header["provenance"]
