"""Sheets of images as PNG files."""

from __future__ import annotations

import io
import math
from os import PathLike

import numpy as np
from PIL import Image

from art_pixeldefend.files import write_atomically


def as_picture(image: np.ndarray) -> np.ndarray:
    """Levels (C, H, W), C 1 or 3, in the layout that Pillow and matplotlib expect: (H, W) or (H, W, 3)."""
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Levels (N, C, H, W) arranged in rows in one image (C, H', W'), separated by white lines of one pixel."""
    count, channels, height, width = images.shape
    rows = max(1, math.ceil(count / columns))
    sheet = np.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def write_sheet(path: str | PathLike[str], images: np.ndarray) -> None:
    """Write images as a PNG file, arranged in a rough square that is enlarged to about 400 pixels.

    Args:
        path: the file.
        images: levels (N, C, H, W), C 1 or 3, uint8.

    Raises:
        OSError: if the file cannot be written.
    """
    sheet = tiled(images, max(1, math.ceil(math.sqrt(len(images)))))
    scale = max(1, 400 // sheet.shape[2])
    buffer = io.BytesIO()
    Image.fromarray(as_picture(sheet.repeat(scale, 1).repeat(scale, 2))).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
