"""Time ``bits_per_dim`` against the network's forward passes, alternately on the same images.

    python benchmarks/scoring_speed.py --images 10000 --threads 2 --out benchmarks/results/scoring-24x2.json

The forward passes use the fastest of several chunk sizes and two memory layouts. Images are random, because speed does
not depend on their content.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from published import command
from timing import conditions, fastest_forward, forward, seconds
from torch import Tensor
from tqdm import tqdm

from art_pixeldefend import PixelCNNpp
from art_pixeldefend.files import write_atomically

TRIED = 256  # images for choosing a chunk size
ROUNDS = 9  # short rounds, so that a disturbance of the machine affects both alike


def measure(model: PixelCNNpp, x: Tensor, rounds: int = ROUNDS) -> dict[str, Any]:
    """Rates over all images, and the median of the rounds' ratios; the rounds divide the images among them."""
    how = fastest_forward(model, x[:TRIED])
    forwards, scores = [], []
    for piece in tqdm(x.tensor_split(min(rounds, len(x))), unit="round"):
        forwards.append(seconds(partial(forward, model, piece, **how), model.device))
        scores.append(seconds(partial(model.bits_per_dim, piece), model.device))
    ratios = [score / alone for score, alone in zip(scores, forwards, strict=True)]
    return {
        "forward": how, "images": len(x), "rounds": len(ratios),
        "forward_images_per_second": round(len(x) / sum(forwards), 2),
        "scoring_images_per_second": round(len(x) / sum(scores), 2),
        "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }  # fmt: skip


def some_images(model: PixelCNNpp, count: int) -> Tensor:
    """Random levels (count, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *model.image_shape), generator=generator).to(torch.uint8).to(model.device)


def main(
    filters: Annotated[int, typer.Option(help="feature maps")] = 24,
    resnets: Annotated[int, typer.Option(help="gated resnets per stage")] = 2,
    image_shape: Annotated[tuple[int, int, int], typer.Option(help="channels, height, width")] = (1, 28, 28),
    images: Annotated[int, typer.Option(min=1, help="number of random images")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds, which divide the images")] = ROUNDS,
    threads: Annotated[int | None, typer.Option(help="number of threads; default: torch's choice")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Time bits_per_dim against the fastest forward passes and print the figures."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    model = PixelCNNpp(image_shape, filters, resnets).to(device).eval()
    x = some_images(model, images)
    model.initialise(x[:100])
    record = {
        "command": command("scoring_speed.py"), **conditions(model.device),
        "settings": {"filters": filters, "resnets": resnets, "image_shape": list(image_shape)},
        "result": measure(model, x, rounds),
    }  # fmt: skip
    print(json.dumps(record, indent=2))
    if out:
        write_atomically(out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
