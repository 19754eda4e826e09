"""Build, save and load the paper's networks, and wrap them for ART."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor import Preprocessor
from art.estimators.classification import PyTorchClassifier
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from art_pixeldefend.classifiers.layers import Network
from art_pixeldefend.classifiers.resnet import ResNet
from art_pixeldefend.classifiers.vgg import VGG
from art_pixeldefend.models import checkpoint
from art_pixeldefend.validation import check_choice

NETWORKS: dict[str, type[Network]] = {"resnet": ResNet, "vgg": VGG}
WEIGHTS = Path(__file__).parent / "weights"


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
    check_choice("network", network, NETWORKS)
    width = 4 if image_shape[0] == 1 else 16
    configuration = {"image_shape": tuple(image_shape), "classes": classes, "width": width} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = NETWORKS[network](**configuration)
        except TypeError as error:
            raise ValueError(f"sizes must be arguments of {network}: {error}") from None
    model.network, model.configuration, model.provenance = network, configuration, {}  # what save() writes
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


def save(
    path: str | PathLike[str],
    model: Network,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a network that :func:`build` made as safetensors, with its configuration in the header, atomically.

    Args:
        path: the file to write.
        model: the network.
        provenance: how it was trained; JSON-serialisable; default: the network's own.
        dtype: store floating-point tensors in this type; default: as they are.

    Raises:
        OSError: if the file cannot be written.
    """
    provenance = model.provenance if provenance is None else provenance
    header = {"network": model.network, "configuration": model.configuration, "provenance": dict(provenance)}
    tensors = model.state_dict()
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    checkpoint.write(path, tensors, header)


def names() -> list[str]:
    """Names of the bundled classifiers."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def load(name_or_path: str | PathLike[str]) -> Network:
    """Load a network in evaluation mode, float32, on the CPU. Nothing is unpickled.

    Args:
        name_or_path: the name of a bundled classifier, whose card is the ``.md`` file in ``classifiers/weights``; or a
            file that :func:`save` wrote.

    Returns:
        The network, from images (N, C, H, W) in [0, 1] to logits; its ``provenance`` says how it was trained.

    Raises:
        FileNotFoundError: if there is neither a bundled classifier of that name nor a file at that path.
        ValueError: if the file is truncated, corrupted, or holds something else.

    Example:
        >>> network = load("fashion-mnist-resnet")
        >>> network(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    bundled = isinstance(name_or_path, str) and name_or_path in names()
    path = WEIGHTS / f"{name_or_path}.safetensors" if bundled else Path(name_or_path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} is neither a file nor one of {', '.join(names())}")
    tensors, header = checkpoint.read(path)
    try:
        model = build(header["network"], **header["configuration"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path {str(path)!r} is not a file of a classifier: {error}") from error
    model.provenance = header["provenance"]
    return model.eval()


def load_module(source: str, weights: str | PathLike[str] | None = None) -> nn.Module:
    """Load a classifier of any kind, in evaluation mode: images (N, C, H, W) in [0, 1] to logits.

    Args:
        source: what :func:`load` takes; a TorchScript file; or ``"package.module:function"``, a function or class
            without arguments that returns a module.
        weights: a safetensors file with the module's ``state_dict``, for the last of these.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming ``classifier`` or ``weights``, if it is not as described.
    """
    path = Path(source)
    module, _, function = source.partition(":")
    imported = bool(function) and not path.exists()
    if weights is not None and not imported:
        raise ValueError(f"weights must be given with package.module:function only, classifier is {source!r}")
    if path.is_file() and path.suffix != ".safetensors":
        try:
            return torch.jit.load(source, map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"classifier {source!r} is not a TorchScript file, as torch.jit.save makes") from error
    if not imported:
        return load(source)
    try:
        model = getattr(import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"classifier {source!r} cannot be made: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"classifier {source!r} must return a torch module, got {type(model).__name__}")
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"weights {str(weights)!r} do not fit: {error}") from error
    return model.eval()
