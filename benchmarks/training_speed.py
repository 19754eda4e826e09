"""Time the trainer's step against a plain eager float32 NCHW step, alternately on the same batches.

    python benchmarks/training_speed.py --filters 24 --resnets 2 --threads 2 --losses 300 \\
        --out benchmarks/results/training-24x2.json

Images are random, because speed does not depend on their content. ``--losses N`` also trains in both ways for N steps
on digits from several seeds, and tests whether the losses differ by more than they vary between seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published import command
from timing import conditions

from art_pixeldefend import PixelCNNpp, datasets
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models.gradients import Eager, gradients_of
from art_pixeldefend.models.training import Settings, State
from art_pixeldefend.precision import bf16_pays


def stepper(model: PixelCNNpp, plain: bool, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that makes one training step on a batch of levels and returns the loss."""
    layout = torch.contiguous_format if plain else torch.channels_last
    model = model.to(device=device, memory_format=layout).train()
    state = State(model, Settings(steps=10**6))

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=not plain and bf16_pays(device)):
            return model.loss(batch)

    gradients = Eager(loss_of) if plain else gradients_of(loss_of, model, device)

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = gradients(batch.contiguous(memory_format=layout))
        state.update(loss)
        return loss

    return step


def build(arguments: argparse.Namespace, images: torch.Tensor, seed: int = 0) -> PixelCNNpp:
    """The same model, with the same weights, whenever it is called with the same seed."""
    torch.manual_seed(seed)
    model = PixelCNNpp(tuple(images.shape[1:]), arguments.filters, arguments.resnets, dropout=arguments.dropout)
    model.initialise(images[:16])
    return model


def images_per_second(step: Callable, batch: torch.Tensor, seconds: float) -> float:
    """The rate of ``step`` over about ``seconds`` seconds."""
    began, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds or not steps:
        step(batch).item()  # waits for a GPU
        steps += 1
    return steps * len(batch) / elapsed


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Medians over alternating rounds, and of their ratios."""
    batch = torch.randint(0, 256, (arguments.batch, *arguments.image_shape)).to(torch.uint8).to(device)
    steps = {name: stepper(build(arguments, batch.cpu()), name == "plain", device) for name in ("plain", "trainer")}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        images_per_second(step, batch, 1.0)
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            rates[name].append(images_per_second(step, batch, arguments.seconds))
    ratios = [fast / slow for fast, slow in zip(rates["trainer"], rates["plain"], strict=True)]
    return {f"{name}_images_per_second": round(statistics.median(r), 2) for name, r in rates.items()} | {
        "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }  # fmt: skip


def loss(arguments: argparse.Namespace, device: torch.device, name: str, seed: int) -> float:
    """Mean bits per dimension of the last 50 steps on digits; the seed is that of weights and dropout."""
    images = torch.from_numpy(datasets.load("digits").x_train)
    step, order, seen = stepper(build(arguments, images, seed), name == "plain", device), torch.Generator(), []
    order.manual_seed(0)
    for _ in range(arguments.losses):
        ids = torch.randint(0, len(images), (arguments.batch,), generator=order)
        seen.append(step(images[ids].to(device)).item())
    return statistics.mean(seen[-50:])


def losses(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Losses in both ways, and whether their means are within two standard errors of each other."""
    found = {
        name: [loss(arguments, device, name, seed) for seed in range(arguments.seeds)] for name in ("plain", "trainer")
    }
    difference = statistics.mean(found["trainer"]) - statistics.mean(found["plain"])
    variance = statistics.mean(statistics.variance(values) for values in found.values())
    error = math.sqrt(2 * variance / arguments.seeds)
    equal = abs(difference) <= 2 * error
    print(
        f"losses after {arguments.losses} steps {'are equal within noise' if equal else 'DIFFER'}: "
        f"{difference:+.4f} bits/dim, standard error {error:.4f}"
    )
    return {f"{name}_losses_bits_per_dim": [round(value, 4) for value in values] for name, values in found.items()} | {
        "loss_difference": round(difference, 4), "standard_error": round(error, 4), "equal_within_noise": equal,
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, default=24)
    parser.add_argument("--resnets", type=int, default=2)
    parser.add_argument("--image-shape", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    parser.add_argument("--losses", type=int, default=0, help="also compare the losses after this many steps on digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds for --losses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    result = measure(arguments, device)
    if arguments.losses:
        result |= losses(arguments, device)
    record = {
        "command": command("training_speed.py"), **conditions(device),
        "settings": {"filters": arguments.filters, "resnets": arguments.resnets, "batch": arguments.batch,
                     "dropout": arguments.dropout, "image_shape": list(arguments.image_shape),
                     "bf16": bf16_pays(device)},
        "result": result,
    }  # fmt: skip
    print(json.dumps(record, indent=2))
    if arguments.out:
        write_atomically(arguments.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
