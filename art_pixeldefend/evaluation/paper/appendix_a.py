"""The counts of PixelDefend's Appendix A."""

from __future__ import annotations

import numpy as np

PAPER_THRESHOLDS = {"cifar-10": 4.5}  # bits per dimension
PAPER_SHARE = 175 / 10_000


def appendix_a(
    dataset: str, clean: np.ndarray, noisy: np.ndarray, clean_error: float, noisy_error: float
) -> dict[str, float | int | str]:
    """Count the test images above a threshold of bits per dimension, with and without random noise (Appendix A).

    The paper's threshold is 4.5 on CIFAR-10; 175 of 10,000 clean test images and 9,874 noisy ones lie above it. For
    other data the threshold is where the same share of the clean images, 1.75%, lies above it. A classifier that
    answers at random above the threshold is almost as accurate as before on clean images, but random noise fools it.

    Args:
        dataset: the data set's name.
        clean, noisy: bits per dimension (N,) of the same images.
        clean_error, noisy_error: the classifier's error on them, 0..1.

    Returns:
        Threshold, counts, and the expected accuracies of such a classifier in percent.
    """
    known = PAPER_THRESHOLDS.get(dataset)
    threshold = float(np.quantile(clean, 1 - PAPER_SHARE)) if known is None else known
    above = {"clean": int((clean > threshold).sum()), "noisy": int((noisy > threshold).sum())}
    # The paper's model: accurate as before below the threshold, right one time in ten above it.
    fooled = {
        kind: 100 * float((1 - error) * (1 - above[kind] / len(clean)) + 0.1 * above[kind] / len(clean))
        for kind, error in (("clean", clean_error), ("noisy", noisy_error))
    }
    return {
        "threshold_bits_per_dim": threshold,
        "threshold": "the paper's" if known is not None else "1.75% of the clean images are above, as in the paper",
        "images": len(clean),
        "above": above["clean"],
        "above_with_noise": above["noisy"],
        "accuracy_at_random_above_percent": fooled["clean"],
        "accuracy_at_random_above_with_noise_percent": fooled["noisy"],
    }
