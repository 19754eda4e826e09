"""Noticing that a model's weights have changed."""

from __future__ import annotations

import torch

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp


class Snapshot:
    """A copy of a model's parameters to compare with; version counters would miss writes through ``.data``."""

    def __init__(self, pixel_cnn: PixelCNNpp) -> None:
        parameters = [parameter.detach() for parameter in pixel_cnn.parameters()]
        self._flat = torch.cat([parameter.flatten() for parameter in parameters])
        pieces = self._flat.split([parameter.numel() for parameter in parameters])
        self._pieces = [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]

    def matches(self, pixel_cnn: PixelCNNpp) -> bool:
        """Whether the parameters are the same numbers, of the same data type and on the same device."""
        if (pixel_cnn.dtype, pixel_cnn.device) != (self._flat.dtype, self._flat.device):
            return False
        if self._flat.is_cuda:  # one comparison: each waits for the GPU
            return torch.cat([parameter.detach().flatten() for parameter in pixel_cnn.parameters()]).equal(self._flat)
        return all(map(torch.equal, self._pieces, pixel_cnn.parameters()))
