"""Attack a defended classifier of which only the labels are known, through a substitute (Papernot et al. 2017).

    python examples/black_box.py

trains a classifier of Fashion-MNIST and puts ``ManifoldProjection`` in front of it, as in the Robust Manifold Defense
(Jalal et al. 2017). The attacker has 150 images and asks the defended classifier for their labels, trains another
network on them, and asks again for images moved along that network's gradients (Jacobian-based augmentation). ART's
FGSM and PGD then attack the substitute, and their images are shown to the defended classifier. The same is done without
a defence. It takes minutes on two CPU cores.
"""

from collections.abc import Callable

import numpy as np
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_pixeldefend import ManifoldProjection, classifiers, datasets

STEP = 0.1  # of the augmentation, in the range from 0 to 1 (Papernot et al.)
RADII = (8, 25)  # of the attacks, in levels of 255


def main(
    *, training_steps: int = 1000, epochs: int = 10, rounds: int = 6, queries: int = 150, images: int = 500
) -> dict[str, dict[str, float]]:
    """Print the accuracies of the classifier alone and defended, in percent, and return them."""
    data = datasets.load("fashion-mnist")
    network = classifiers.build("resnet", data.image_shape, units=1)
    recipe = classifiers.Recipe(training_steps, learning_rate=0.2, weight_decay=1e-4)
    classifiers.train(network, data.x_train, data.y_train, recipe)
    victims = {
        "no defence": classifiers.as_art(network),
        "ManifoldProjection": classifiers.as_art(network, [ManifoldProjection("fashion-mnist-vae", steps=30)]),
    }
    x, y = data.x_test[:images].astype(np.float32) / 255, data.y_test[:images]
    seeds = data.x_test[-queries:].astype(np.float32) / 255  # the attacker's own images

    results = {}
    for name, victim in victims.items():

        def ask(x: np.ndarray, victim: PyTorchClassifier = victim) -> np.ndarray:
            return victim.predict(x, batch_size=256).argmax(axis=1)

        substitute, asked = train_substitute(ask, seeds, rounds, epochs)
        agreement = 100 * float((substitute.predict(x).argmax(axis=1) == ask(x)).mean())
        results[name] = {"queries": asked, "agreement": agreement, "clean": 100 * float((ask(x) == y).mean())}
        for eps in RADII:
            for attack in (
                FastGradientMethod(substitute, eps=eps / 255),
                ProjectedGradientDescent(substitute, eps=eps / 255, eps_step=eps / 1020, max_iter=20, verbose=False),
            ):
                title = "FGSM" if isinstance(attack, FastGradientMethod) else "PGD"
                results[name][f"{title} {eps}"] = 100 * float((ask(attack.generate(x, y)) == y).mean())
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in results[name].items()), flush=True)
    return results


def train_substitute(
    ask: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int, epochs: int
) -> tuple[PyTorchClassifier, int]:
    """Train a network on the labels that ``ask`` gives, with as many images again in every round.

    Args:
        ask: returns the class numbers (N,) of images.
        x: the first images (N, 1, 28, 28) in [0, 1].
        rounds: of augmentation.
        epochs: of training before each round, and after the last one.

    Returns:
        The substitute, and how many images ``ask`` was given.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # ART shuffles with NumPy's generator
    network = nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    substitute = PyTorchClassifier(network, nn.CrossEntropyLoss(), x.shape[1:], 10, adam, clip_values=(0.0, 1.0))
    labels = ask(x)
    substitute.fit(x, labels, batch_size=64, nb_epochs=epochs)
    for _ in range(rounds):
        moved = augmented(substitute, x, labels)
        x, labels = np.concatenate([x, moved]), np.concatenate([labels, ask(moved)])
        substitute.fit(x, labels, batch_size=64, nb_epochs=epochs)
    network.eval()
    return substitute, len(x)


def augmented(substitute: PyTorchClassifier, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images moved by ``STEP`` along the signs of the gradients of their labels' outputs, and clipped to [0, 1]."""
    parts = [substitute.class_gradient(x[i : i + 256], label=labels[i : i + 256])[:, 0] for i in range(0, len(x), 256)]
    return np.clip(x + STEP * np.sign(np.concatenate(parts)), 0, 1).astype(np.float32)


if __name__ == "__main__":
    main()
