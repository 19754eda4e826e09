"""Measure decoding time in forward-pass equivalents (FPE).

FPE is the time to purify a batch divided by the time of the fastest plain float32 forward pass of the same network over
the same images with the same threads. Both are timed alternately, in rounds, so that other processes on the machine
slow both alike; the result is the median of the rounds' ratios. Every purified batch is certified.

    python benchmarks/decoding_speed.py --filters 40 --resnets 5 --batch 1 256
    python benchmarks/decoding_speed.py --image-shape 3 32 32 --filters 64 --resnets 3 --batch 1 64
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import command
from timing import conditions, fastest_forward, forward, seconds
from torch import Tensor

from art_pixeldefend import PixelCNNpp, datasets, greedy_decode
from art_pixeldefend.models.pixelcnnpp.decoders import ENGINES, certify, choose_engine
from art_pixeldefend.models.zoo import as_model


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, default=40)
    parser.add_argument("--resnets", type=int, default=5)
    parser.add_argument("--mixtures", type=int, default=10)
    parser.add_argument("--image-shape", type=int, nargs=3, default=(1, 28, 28), metavar=("C", "H", "W"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--eps", type=int, default=32, help="in levels")
    parser.add_argument("--method", nargs="+", default=["auto"], choices=["auto", *ENGINES])
    parser.add_argument("--model", help="a bundled model or a .safetensors file, instead of random weights")
    parser.add_argument("--data", help="a data set, whose test images replace the synthetic ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="decode in bfloat16 (not exact)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


# Model and images


def make_model(options: argparse.Namespace, image_shape: tuple[int, int, int]) -> PixelCNNpp:
    """Load the model asked for, or initialise one with random weights."""
    if options.model:
        return as_model(options.model, PixelCNNpp, torch.device(options.device), name="--model")
    torch.manual_seed(0)
    model = PixelCNNpp(image_shape, options.filters, options.resnets, options.mixtures).eval()
    model.initialise(synthetic_images(16, image_shape))
    return model.to(options.device)


def synthetic_images(count: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Gradients with noise: neighbouring pixels are similar, as in images."""
    rng = np.random.default_rng(0)
    channels, height, width = image_shape
    slope = rng.normal(0, 60, (count, channels, 1, 1)) * np.linspace(-1, 1, height)[:, None]
    slope = slope + rng.normal(0, 60, (count, channels, 1, 1)) * np.linspace(-1, 1, width)
    noise = rng.normal(0, 8, (count, *image_shape))
    return torch.from_numpy(np.clip(np.round(128 + slope + noise), 0, 255).astype(np.uint8))


def images(options: argparse.Namespace, model: PixelCNNpp, count: int) -> Tensor:
    """Levels (count, C, H, W) to purify."""
    if options.data:
        return torch.from_numpy(datasets.load(options.data).x_test[:count]).to(options.device)
    return synthetic_images(count, model.image_shape).to(options.device)


# Timing


class PassCounter:
    """Context manager that counts the images which pass through the network."""

    def __init__(self, model: PixelCNNpp) -> None:
        self.images = 0
        self._model = model

    def __enter__(self) -> PassCounter:
        self._hook = self._model.network.register_forward_pre_hook(self._count)
        return self

    def _count(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self.images += len(inputs[0])

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def measure(options: argparse.Namespace, model: PixelCNNpp, batch: int) -> list[dict[str, Any]]:
    """Time each method on one batch, and certify its result."""
    x = images(options, model, batch)
    how = fastest_forward(model, x)
    plain = partial(forward, model, x, **how)
    decoder_model = copy.deepcopy(model).bfloat16() if options.bf16 else model
    decoders = {
        method: lambda method=method: greedy_decode(decoder_model, x, options.eps, method, batch_size=batch)
        for method in options.method
    }
    checks = {}
    for method, decoder in decoders.items():  # the first call compiles
        with PassCounter(decoder_model) as passes:
            purified = decoder()
        certificate = certify(model, x, purified, options.eps)
        checks[method] = {
            "network_passes": round(passes.images / len(x), 2),
            "certified": int(certificate.exact.sum()),
            "ties": int(certificate.ties.sum()),
            "largest_gap_nats": float(certificate.gap.max()),
        }
    forwards: list[float] = []
    decodes: dict[str, list[float]] = {method: [] for method in decoders}
    for _ in range(options.rounds):
        forwards.append(seconds(plain, model.device))
        for method, decoder in decoders.items():
            decodes[method].append(seconds(decoder, model.device))
    return [
        row(model, options, len(x), method, choose_engine(decoder_model, method), how, forwards, decodes[method])
        | checks[method]
        for method in decoders
    ]


def row(model, options, count, method, engine, how, forwards, decodes) -> dict[str, Any]:
    """One method's figures, as written to the JSON file."""
    ratios = [decode / forward for decode, forward in zip(decodes, forwards, strict=True)]
    return {
        "image_shape": list(model.image_shape),
        "filters": model.filters,
        "resnets": model.resnets,
        "mixtures": model.mixtures,
        "batch": count,
        "eps": options.eps,
        "method": method,
        "decoded_in": "bfloat16" if options.bf16 else "float32",
        "engine": engine,
        "fpe": round(statistics.median(ratios), 3),
        "fpe_lowest": round(min(ratios), 3),
        "fpe_highest": round(max(ratios), 3),
        "seconds": statistics.median(decodes),
        "images_per_second": round(count / statistics.median(decodes), 2),
        "forward_seconds": statistics.median(forwards),
        "forward": how,
    }


# Results


def report(rows: list[dict[str, Any]]) -> None:
    """Print one line per row."""
    for r in rows:
        shape = "x".join(map(str, r["image_shape"]))
        print(
            f"{shape} {r['filters']}x{r['resnets']} batch {r['batch']:4d} eps {r['eps']:3d} {r['engine']:>11}: "
            f"{r['fpe']:7.3f} FPE ({r['fpe_lowest']}-{r['fpe_highest']}), {r['images_per_second']:8.2f} images/s, "
            f"{r['network_passes']:6.2f} passes, certified {r['certified']}/{r['batch']}, {r['ties']} ties, "
            f"gap {r['largest_gap_nats']:.1e}",
            flush=True,
        )


def main() -> None:
    """Measure, print and write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model, rows = make_model(options, tuple(options.image_shape)), []
    for batch in options.batch:
        rows += measure(options, model, batch)
        report(rows[-len(options.method) :])
    result = {
        "command": command("decoding_speed.py"),
        **conditions(torch.device(options.device)),
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
