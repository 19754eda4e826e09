"""The scripts in examples/ run."""

import runpy
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_readmes_picture_can_be_drawn(fashion_mnist, tmp_path):
    script = runpy.run_path(str(EXAMPLES / "purified_images.py"))
    script["main"](tmp_path / "picture.png", epochs=1, training_images=500, shown=2)
    assert Image.open(tmp_path / "picture.png").format == "PNG"
