"""Evaluate a purified classifier as RobustBench does: clean accuracy and accuracy under AutoAttack, as one JSON object.

    pip install -c constraints.txt ".[autoattack]"
    python examples/robustbench_style.py --images 100

AutoAttack's version ``rand`` takes two attacks of 100 steps with 20 gradients each, which is hours on a CPU.
``--steps 10 --draws 2`` gives a first look in minutes.
"""

import argparse
import json

import torch
from pyautoattack import AutoAttack
from torch import nn

from art_pixeldefend import PurifiedModel, ScorePurifier, classifiers, datasets

EPS = 8  # levels


def load_model(runs: int = 4) -> nn.Module:
    """The defended classifier as a module from images in [0, 1] to logits, which is all that RobustBench asks for."""
    classifier = classifiers.load("fashion-mnist-resnet")
    return PurifiedModel(classifier, ScorePurifier("fashion-mnist-score", sigma=0.25), runs=runs).eval()


def main(images: int = 100, steps: int = 100, draws: int = 20, runs: int = 4) -> dict:
    """Print and return the entry of a leaderboard."""
    torch.manual_seed(0)
    data = datasets.load("fashion-mnist-500")
    x, y = torch.from_numpy(data.x_test[:images]) / 255, torch.from_numpy(data.y_test[:images])
    model = load_model(runs)
    adversary = AutoAttack(model, norm="Linf", eps=EPS / 255, version="rand", seed=0)
    adversary.apgd.n_iter, adversary.apgd.eot_iter = steps, draws
    attacked, _ = adversary.run_standard_evaluation(x, y, batch_size=50)
    with torch.no_grad():
        clean, robust = ((model(z).argmax(dim=1) == y).float().mean().item() for z in (x, attacked))
    entry = {
        "dataset": "fashion-mnist", "threat_model": "Linf", "eps": f"{EPS}/255", "images": images,
        "name": "ResNet-62 behind ScorePurifier(sigma=0.25)", "clean_acc": round(100 * clean, 2),
        "autoattack_acc": round(100 * robust, 2), "version": "rand", "apgd_steps": steps, "eot_draws": draws,
    }  # fmt: skip
    print(json.dumps(entry, indent=2))
    return entry


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in {"images": 100, "steps": 100, "draws": 20, "runs": 4}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    main(**vars(parser.parse_args()))
