"""Networks by the paper's names: built, wrapped for ART, saved and loaded."""

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
    """A fresh network, the same for the same seed.

    Args:
        network: ``"resnet"`` or ``"vgg"``.
        image_shape: (C, H, W).
        classes: how many.
        seed: of the initial weights.
        sizes: as the network takes them; by default the paper's for grey or colour images.

    Raises:
        ValueError: for an unknown network or size.
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
    """An ART classifier of images in [0, 1] around a network that :func:`build` made, in evaluation mode.

    Args:
        model: the network.
        defences: preprocessing defences in front of it.
        arguments: further ones of :class:`PyTorchClassifier`.
    """
    # A third faster on a CPU, the same but for rounding. (torch's annotations leave the argument out.)
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
    """The fraction of images (N, C, H, W) in [0, 1] that get their class (N,)."""
    return float((classifier.predict(x, batch_size=batch_size).argmax(axis=1) == y).mean())


def save(path: str | PathLike[str], model: Network, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a network that :func:`build` made as safetensors, its configuration in the header.

    Raises:
        OSError: if the file cannot be written; nothing partial is left.
    """
    header = {"network": model.network, "configuration": model.configuration, "provenance": dict(provenance or {})}
    checkpoint.write(path, model.state_dict(), header)


def load(path: str | PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """The network in a file that :func:`save` wrote, in evaluation mode, and its provenance. Nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, corrupted, or holds something else.
    """
    tensors, header = checkpoint.read(path)
    try:
        model = build(header["network"], **header["configuration"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path {str(path)!r} holds no classifier: {error}") from error
    return model.eval(), header["provenance"]
