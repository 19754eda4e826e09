"""How far the true class's logit is above the others, and the gradient of that."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn


class Margin:
    """z_true - max over the others of z, and its gradient: one backward pass where ART's ``class_gradient`` takes ten.

    Args:
        estimator: an ART classifier with class gradients that outputs logits. For a :class:`PyTorchClassifier` a second
            one is made around the same model and defences, with the margin as its loss: defences it is given later
            are not seen.
    """

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator
        self._loss = _MarginLoss()
        self._twin = self._second_classifier() if type(estimator) is PyTorchClassifier else None

    def __call__(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Margins (N,) and gradients like ``x`` (N, ...) for one-hot labels ``y`` (N, classes)."""
        if self._twin is not None:
            gradients = self._twin.loss_gradient(x, y.astype(np.float32))
            return self._loss.margins, gradients
        logits, true = self.estimator.predict(x, batch_size=len(x)), y.argmax(axis=1)
        rivals = np.where(y > 0, -np.inf, logits).argmax(axis=1)
        rows = np.arange(len(x))
        gradients = self.estimator.class_gradient(x, label=true) - self.estimator.class_gradient(x, label=rivals)
        return logits[rows, true] - logits[rows, rivals], gradients.reshape(x.shape)

    def _second_classifier(self) -> PyTorchClassifier:
        estimator = self.estimator
        return PyTorchClassifier(
            estimator.model,
            loss=self._loss,
            input_shape=estimator.input_shape,
            nb_classes=estimator.nb_classes,
            channels_first=estimator.channels_first,
            clip_values=estimator.clip_values,
            preprocessing_defences=estimator.preprocessing_defences,
            preprocessing=estimator.preprocessing,
            device_type="gpu" if estimator.device.type == "cuda" else "cpu",
        )


class _MarginLoss(nn.Module):
    """The sum of the batch's margins; each is kept, which saves a forward pass."""

    margins: np.ndarray

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        rivals = logits.masked_fill(y > 0, -torch.inf).amax(dim=1)
        margins = (logits * y).sum(dim=1) - rivals
        self.margins = margins.detach().cpu().numpy()
        return margins.sum()
