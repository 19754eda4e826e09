"""The incremental engine in plain PyTorch, for any device, data type and rule.

In large batches the columns of a row are decoded one after the other. In small batches PyTorch's overhead per operation
would dominate; there, all columns that are not final yet are computed at once, again and again until their levels stay
the same. Each time, the levels up to the first that changed are final (Song et al. 2020, arXiv:2002.03629).
"""

from __future__ import annotations

import torch
from torch import Tensor

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders.incremental import IncrementalNetwork, Memory, small_batch
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Rule

ALIGNED = 4  # iterations start at a multiple of this column, so that few different lists of operations are recorded


def cached_decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    """Decode with any rule.

    Args:
        pixel_cnn: the density model.
        x: levels (N, C, H, W) from which the iteration over a row starts.
        rule: chooses the levels.

    Returns:
        Levels (N, C, H, W).
    """
    with torch.inference_mode():  # in small batches a fifth faster than no_grad
        found = _decode(pixel_cnn, x, rule)
    return found.clone()  # a tensor made in inference mode could not be written to outside of it


def _decode(pixel_cnn: PixelCNNpp, x: Tensor, rule: Rule) -> Tensor:
    count, _, height, width = x.shape
    if not count:
        return x
    network = IncrementalNetwork(pixel_cnn, Memory(pixel_cnn.network.head.bias, count))
    found = x.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)  # (H, W, N, C)
    pixels = torch.arange(count * height * width, device=x.device).view(count, height, width).permute(1, 2, 0)
    decode_row = _decode_row_by_iteration if small_batch(count) else _decode_row_by_columns
    for row in range(height):
        network.begin_row(row)
        decode_row(network, rule, found[row], pixels[row], row)
    return found.permute(2, 3, 0, 1).contiguous()


def _decode_row_by_columns(network: IncrementalNetwork, rule: Rule, found: Tensor, pixels: Tensor, row: int) -> None:
    """Decode the levels ``found`` (W, N, C) of a row in place, whose positions in the batch are ``pixels`` (W, N)."""
    channels = found.shape[-1]
    for column in range(len(found)):
        outputs = network.outputs(row, column, column + 1)
        found[column] = rule.choose_pixels(outputs, pixels[column], channels)
        network.write_levels(row, column, found[column : column + 1])


def _decode_row_by_iteration(network: IncrementalNetwork, rule: Rule, found: Tensor, pixels: Tensor, row: int) -> None:
    """The same, by iteration over all columns that are not final."""
    width, count, channels = found.shape
    first = 0
    network.write_levels(row, first, found)
    while first < width:
        start = first - first % ALIGNED
        outputs = network.outputs(row, start, width)[(first - start) * count :]
        levels = rule.choose_pixels(outputs, pixels[first:].flatten(), channels).view(-1, count, channels)
        changed = (levels != found[first:]).flatten(1).any(dim=1).nonzero()
        found[first:] = levels
        network.write_levels(row, first, levels)
        first = first + int(changed[0]) + 1 if len(changed) else width
