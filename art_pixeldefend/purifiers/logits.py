"""Logits of ART classifiers as differentiable tensors, through their preprocessing defences."""

from __future__ import annotations

from typing import Any

import torch
from art.defences.preprocessor import Preprocessor
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor


def differentiable_logits(estimator: PyTorchClassifier, x: Tensor) -> Tensor:
    """Return the classifier's logits for images, differentiable with respect to the images.

    Gradients through a preprocessing defence are those that the defence declares: autograd's for PyTorch
    preprocessors, ``estimate_gradient`` for NumPy ones.

    Args:
        estimator: a classifier whose outputs are logits; its model is put into evaluation mode.
        x: images (N, ...) in the units of its clip values, on its device.

    Returns:
        Logits (N, classes).
    """
    estimator.model.eval()
    for operation in estimator.preprocessing_operations:
        if operation.apply_predict:
            torch_operation = isinstance(operation, PreprocessorPyTorch)
            x = operation.forward(x)[0] if torch_operation else _NumPyPreprocessor.apply(x, operation)
    return estimator.model(x)


class _NumPyPreprocessor(torch.autograd.Function):
    """Forward: a NumPy preprocessor. Backward: its own estimate of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Preprocessor) -> Tensor:
        ctx.x, ctx.operation = x.detach().cpu().numpy(), operation
        return torch.as_tensor(operation(ctx.x)[0], dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.operation.estimate_gradient(ctx.x, gradients[0].cpu().numpy())
        return torch.as_tensor(gradient, dtype=gradients[0].dtype, device=gradients[0].device), None
