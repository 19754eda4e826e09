"""Defend a network in plain PyTorch: train it, put a purifier in front of it, and attack through the purifier.

    python examples/plain_pytorch.py

It uses scikit-learn's digits and bundled models, and takes a few seconds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from art_pixeldefend import PurifiedModel, ScorePurifier, datasets

EPS = 40 / 255


def main(epochs: int = 30, images: int = 100, steps: int = 20) -> dict[str, float]:
    """Print and return the accuracies by name."""
    torch.manual_seed(0)
    data = datasets.load("digits")
    x_train, y_train = torch.from_numpy(data.x_train) / 255, torch.from_numpy(data.y_train)
    x, y = torch.from_numpy(data.x_test[:images]) / 255, torch.from_numpy(data.y_test[:images])

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x_train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
    model.eval()

    # A module like any other: images in [0, 1] to logits, differentiable, averaged over 8 draws of the purifier.
    robust = PurifiedModel(model, ScorePurifier("digits-score", sigma=0.25), runs=8).eval()
    blind, white_box = pgd(model, x, y, steps), pgd(robust, x, y, steps)
    results = {
        "undefended, clean": accuracy(model, x, y),
        "undefended, attacked": accuracy(model, blind, y),
        "purified, clean": accuracy(robust, x, y),
        "purified, blind attack": accuracy(robust, blind, y),
        "purified, attack through the purifier": accuracy(robust, white_box, y),
    }
    for name, value in results.items():
        print(f"{name}: {value:.2f}")
    return results


def pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Projected gradient descent within ``EPS`` (Madry et al. 2018)."""
    attacked = x.clone()
    for _ in range(steps):
        attacked.requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)[0]
        attacked = attacked.detach() + EPS / 5 * gradient.sign()
        attacked = torch.clamp(torch.clamp(attacked, x - EPS, x + EPS), 0, 1)
    return attacked


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of images that are classified correctly."""
    return (model(x).argmax(dim=1) == y).float().mean().item()


if __name__ == "__main__":
    main()
