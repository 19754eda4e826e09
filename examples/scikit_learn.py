"""Defend an estimator that works on NumPy arrays: a logistic regression of scikit-learn, attacked through ART.

    python examples/scikit_learn.py

scikit-learn takes flat images, purifiers take (N, C, H, W): a preprocessor between them changes the shape.
"""

from typing import Any

import numpy as np
from art.attacks.evasion import FastGradientMethod
from art.defences.preprocessor.preprocessor import Preprocessor
from art.estimators.classification import SklearnClassifier
from sklearn.linear_model import LogisticRegression

from art_pixeldefend import PixelDefend, datasets


class OnFlatImages(Preprocessor):
    """Apply a purifier to flat images (N, C * H * W).

    Args:
        purifier: a purifier of images (N, C, H, W).
        image_shape: (C, H, W).
    """

    params = ["purifier", "image_shape"]

    def __init__(self, purifier: Preprocessor, image_shape: tuple[int, int, int]) -> None:
        super().__init__(is_fitted=True, apply_fit=False, apply_predict=True)
        self.purifier, self.image_shape = purifier, image_shape

    def __call__(self, x: np.ndarray, y: Any | None = None) -> tuple[np.ndarray, Any | None]:
        """Return purified flat images, and ``y`` as it is."""
        purified, y = self.purifier(x.reshape(-1, *self.image_shape), y)
        return purified.reshape(x.shape), y


def main(images: int = 200) -> dict[str, float]:
    """Print and return the accuracies by name."""
    data = datasets.load("digits")
    x_train, x = ((levels.reshape(len(levels), -1) / 255).astype(np.float32) for levels in (data.x_train, data.x_test))
    x, y = x[:images], data.y_test[:images]
    model = LogisticRegression(max_iter=1000).fit(x_train, data.y_train)

    purifier = PixelDefend(eps=56, pixel_cnn="digits")
    classifier = SklearnClassifier(model, clip_values=(0, 1))
    defended = SklearnClassifier(
        model, clip_values=(0, 1), preprocessing_defences=OnFlatImages(purifier, data.image_shape)
    )
    attacked = FastGradientMethod(classifier, eps=40 / 255).generate(x)  # it does not see the defence
    results = {
        f"{name}, {kind}": float((estimator.predict(images).argmax(axis=1) == y).mean())
        for name, estimator in {"undefended": classifier, "purified": defended}.items()
        for kind, images in {"clean": x, "attacked": attacked}.items()
    }
    for name, value in results.items():
        print(f"{name}: {value:.2f}")
    return results


if __name__ == "__main__":
    main()
