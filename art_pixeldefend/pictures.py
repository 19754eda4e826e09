"""Sheets of images as PNG files."""

from __future__ import annotations

import io
import math
from os import PathLike

import numpy as np
from PIL import Image

from art_pixeldefend.files import write_atomically


def as_picture(image: np.ndarray) -> np.ndarray:
    """Levels (C, H, W), C 1 or 3, as what Pillow and matplotlib draw: (H, W) or (H, W, 3), uint8."""
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Levels (N, C, H, W) side by side in one image (C, H', W'), a white line between them."""
    count, channels, tall, wide = images.shape
    rows = max(1, math.ceil(count / columns))
    sheet = np.full((channels, rows * (tall + 1) - 1, columns * (wide + 1) - 1), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (tall + 1), i % columns * (wide + 1)
        sheet[:, top : top + tall, left : left + wide] = image
    return sheet


def write_sheet(path: str | PathLike[str], images: np.ndarray, width: int = 400) -> None:
    """Write levels (N, C, H, W), C 1 or 3, as a roughly square sheet, enlarged to about ``width`` points.

    Raises:
        OSError: if the file cannot be written.
    """
    sheet = tiled(images, max(1, math.ceil(math.sqrt(len(images)))))
    scale = max(1, width // sheet.shape[2])
    buffer = io.BytesIO()
    Image.fromarray(as_picture(sheet.repeat(scale, 1).repeat(scale, 2))).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
