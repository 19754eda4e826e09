"""Train a density model on a folder of images, then purify and detect files in another folder.

    python examples/own_images.py FOLDER [--steps 20000]

FOLDER holds 8-bit images of one size. Without it, the example writes digits into a temporary folder and trains for a
few steps: it then shows the calls, not a good model. ``art-pixeldefend train``, ``purify`` and ``detect`` do the same.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from art_pixeldefend import PixelCNNpp, PixelDefend, PixelDefendDetector, datasets
from art_pixeldefend.models.training import Settings, train


def main(folder: Path, out: Path, steps: int = 20, filters: int = 16, resnets: int = 1) -> np.ndarray:
    """Train on the images in ``folder``, write purified noisy test images to ``out``, and return their p-values."""
    data = datasets.load(folder)  # train, calibration and test images
    model = PixelCNNpp(data.image_shape, filters=filters, resnets=resnets)
    model.initialise(data.x_train[:100])
    settings = Settings(steps=steps, batch_size=16)
    train(model, PixelCNNpp.loss, data.x_train, settings, out / "run", held_out=data.x_test, verbose=False)

    noise = np.random.default_rng(0).integers(-20, 21, data.x_test.shape)
    noisy = np.clip(data.x_test + noise, 0, 255).astype(np.uint8)
    purified, _ = PixelDefend(clip_values=(0, 255), eps=24, pixel_cnn=model)(noisy)
    for i, image in enumerate(purified[:10]):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(out / f"purified-{i}.png")

    detector = PixelDefendDetector(model, clip_values=(0, 255))
    detector.fit(data.calibration(model).x)  # the model was not trained on these
    report, is_adversarial = detector.detect(noisy)
    print(f"{is_adversarial.mean():.0%} of the noisy images are flagged; pictures in {out}")
    return report["p_values"]


def write_digits(folder: Path, count: int = 300) -> None:
    """Write scikit-learn's digits as PNG files."""
    for i, image in enumerate(datasets.load("digits").x_train[:count, 0]):
        Image.fromarray(image).save(folder / f"{i:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("own-images"))
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if given.folder is None:
            write_digits(Path(temporary))
        main(given.folder or Path(temporary), given.out, given.steps)
