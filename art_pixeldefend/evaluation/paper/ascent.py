"""Figure 5: purification by gradient ascent on the likelihood, compared with greedy decoding."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from art_pixeldefend.evaluation import figures
from art_pixeldefend.evaluation.grid import Cell
from art_pixeldefend.evaluation.paper.drawing import drawn_row
from art_pixeldefend.evaluation.paper.grids import DENSITY_MODEL
from art_pixeldefend.evaluation.paper.likelihoods import density_model
from art_pixeldefend.evaluation.stages import Stages
from art_pixeldefend.files import write_atomically
from art_pixeldefend.levels import TOP, to_levels
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.layers import kept_weights
from art_pixeldefend.processes import ProcessGroup, process_group

ATTACK, EPS = "fgsm", 8  # the paper's
METHOD = "L-BFGS-B"


def bits_and_gradient(pixel_cnn: PixelCNNpp, x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the bits per dimension of a real-valued image (C, H, W) in 0..255, and its gradient in bits per level.

    The probability of a value z is the model's mass between z - 1/2 and z + 1/2, open-ended at 0 and 255. On integer
    levels this equals ``bits_per_dim``.
    """
    image = torch.tensor(x[None], dtype=pixel_cnn.dtype, device=pixel_cnn.device, requires_grad=True)
    with pixel_cnn.evaluating():
        nats = -pixel_cnn.sub_pixel_log_probs(image).double().sum()
    bits = nats / (x.size * math.log(2))
    (gradient,) = torch.autograd.grad(bits, image)
    return bits.item(), gradient[0].double().cpu().numpy()


def ascend(
    pixel_cnn: PixelCNNpp, x: np.ndarray, eps: int, *, seed: int = 0, iterations: int | None = None
) -> tuple[np.ndarray, int, str]:
    """Search for the most likely image around ``x`` with SciPy's L-BFGS-B from one random start (section 4.1).

    Args:
        pixel_cnn: the density model.
        x: levels (C, H, W), uint8.
        eps: radius in levels; the start is uniform in the ball.
        seed: of the start.
        iterations: most iterations; SciPy's own limit by default.

    Returns:
        Levels (C, H, W), uint8, rounded at the end; the number of evaluations of the model; why SciPy ended.
    """
    low, high = (np.clip(x.astype(np.float64) + change, 0, TOP) for change in (-eps, eps))
    start = np.random.default_rng(seed).uniform(low, high)

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        bits, gradient = bits_and_gradient(pixel_cnn, values.reshape(x.shape))
        return bits, gradient.ravel()

    bounds = np.stack([low.ravel(), high.ravel()], axis=1)
    options = {} if iterations is None else {"maxiter": iterations}
    with kept_weights(pixel_cnn):
        found = minimize(objective, start.ravel(), jac=True, method=METHOD, bounds=bounds, options=options)
    return np.clip(np.rint(found.x.reshape(x.shape)), low, high).astype(np.uint8), found.nfev, found.message


def ascend_together(
    pixel_cnn: PixelCNNpp, x: np.ndarray, eps: int, *, steps: int = 100, size: float = 2, batch_size: int = 25
) -> np.ndarray:
    """Search for the most likely images around ``x`` with Adam, many at a time.

    It maximises what :func:`ascend` does and starts from ``x`` itself. Each step is clipped to the ball.

    Args:
        pixel_cnn: the density model.
        x: levels (N, C, H, W), uint8.
        eps: radius in levels.
        steps: of Adam, each with a gradient of the model.
        size: of the first step, in levels; it falls to zero in proportion to the steps left.
        batch_size: images per gradient.

    Returns:
        Levels (N, C, H, W), uint8, rounded at the end.
    """
    found = []
    with kept_weights(pixel_cnn), pixel_cnn.evaluating():
        for some in np.split(x, range(batch_size, len(x), batch_size)):
            centre = torch.tensor(some, dtype=pixel_cnn.dtype, device=pixel_cnn.device)
            low, high = ((centre + change).clamp(0, TOP) for change in (-eps, eps))
            image = centre.clone().requires_grad_(True)
            adam = torch.optim.Adam([image], lr=size, betas=(0.9, 0.99))
            schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
            for _ in range(steps):
                (image.grad,) = torch.autograd.grad(-pixel_cnn.sub_pixel_log_probs(image).sum(), image)
                adam.step()
                schedule.step()
                with torch.no_grad():
                    image.copy_(image.clamp(low, high))
            found.append(image.detach().round().to(torch.uint8).cpu().numpy())
    return np.concatenate(found)


def figure_5(
    stages: Stages,
    path: str | PathLike[str],
    *,
    images: int = 10,
    starts: int = 100,
    iterations: int | None = None,
) -> dict[str, Any]:
    """Draw the bits per dimension of test images: clean, under FGSM, decoded greedily, and after L-BFGS-B.

    Every image's results are stored with the grid's; under ``torchrun`` the processes share the images out.

    Args:
        stages: of a grid with a blind PixelDefend row; FGSM has a radius of 8 levels, or the row's first.
        path: of the figure (PNG and PDF without an ending); the numbers are written beside it as JSON.
        images: the first so many test images (the paper: 10).
        starts: random starts of L-BFGS-B per image (the paper: 100).
        iterations: most iterations of one start; SciPy's own limit by default, as in the paper.

    Returns:
        The numbers.

    Raises:
        ValueError: if the grid has no blind PixelDefend row, or its chunks hold fewer images.
    """
    row, chunk = drawn_row(stages.grid), min(stages.grid.chunk, len(stages.data.x_test))
    if row is None or not 0 < images <= chunk:
        raise ValueError(f"images must be between 1 and {chunk}, of a grid with a blind pixeldefend row, got {images}")
    radii = stages.grid.eps_of(row)
    eps = EPS if EPS in radii else radii[0]
    cell = Cell(row, ATTACK, eps)
    group = process_group()
    if group.rank == 0:  # the others read what it stores
        stages.defended(cell, 0, chunk)
    group.wait()
    # The grid's own chunk: its images may be stored already.
    kinds = {
        "clean": stages.clean(0, chunk),
        "FGSM": stages.attacked(cell, 0, chunk),
        "greedy decoding": stages.defended(cell, 0, chunk),
    }
    levels = {name: to_levels(some[:images]) for name, some in kinds.items()}
    searched = _searched(stages, cell, levels["FGSM"], starts, iterations, group)
    bits = {name: density_model(stages).bits_per_dim(some).tolist() for name, some in levels.items()}
    numbers = _numbers(bits, searched) | {
        "eps_attack": eps, "eps_defend": _eps_defend(stages, cell), "images": images, "starts": starts,
        "iterations": iterations, "paper": {"images": 10, "starts": 100},
    }  # fmt: skip
    if group.rank == 0:
        ends = np.concatenate([image["bits_per_dim"] for image in searched])
        figures.likelihood_densities(path, {name: np.array(b) for name, b in bits.items()} | {METHOD: ends})
        write_atomically(Path(path).with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")
    group.wait()
    return numbers


def _eps_defend(stages: Stages, cell: Cell) -> int:
    return dict(stages.steps(cell.row)[0][1])["eps"]


def _searched(
    stages: Stages, cell: Cell, attacked: np.ndarray, starts: int, iterations: int | None, group: ProcessGroup
) -> list[dict[str, Any]]:
    """Return, for every image, each start's final bits per dimension, evaluations, seconds, and why it ended."""
    shared: dict[str, Any] = {
        "attack": stages.attack_key(cell, 0, stages.grid.chunk),
        "density_model": stages.fingerprint(DENSITY_MODEL),
    }
    model = density_model(stages)
    shared |= {"eps": _eps_defend(stages, cell), "iterations": iterations}

    def one(i: int, start: int) -> dict[str, Any]:
        key = shared | {"image": i, "start": start}
        if (kept := stages.store.read("ascent", key)) is None:
            began = time.perf_counter()
            # A seed for each start, so that more starts reuse the earlier ones.
            seed = 100_000 * i + start
            found, asked, ended = ascend(model, attacked[i], shared["eps"], seed=seed, iterations=iterations)
            kept = {
                "bits_per_dim": float(model.bits_per_dim(found[None])), "evaluations": asked, "ended": ended,
                "seconds": round(time.perf_counter() - began, 2),
            }  # fmt: skip
            stages.store.write("ascent", key, kept)
        return kept

    tasks = [(i, start) for start in range(starts) for i in range(len(attacked))]
    mine = {task: one(*task) for task in group.shard(tasks)}
    everyone = {task: found for part in group.gather(mine) for task, found in part.items()}
    names = ("bits_per_dim", "evaluations", "ended", "seconds")
    return [{name: [everyone[i, s][name] for s in range(starts)] for name in names} for i in range(len(attacked))]


def _numbers(bits: dict[str, list[float]], searched: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers behind the figure."""
    ends = np.array([image["bits_per_dim"] for image in searched])
    attacked, greedy = (np.array(bits[name])[:, None] for name in ("FGSM", "greedy decoding"))
    mean = {name: float(np.mean(values)) for name, values in bits.items()} | {METHOD: float(ends.mean())}
    return {
        "mean_bits_per_dim": mean,
        "share_of_starts_less_likely_than_attacked": float((ends > attacked).mean()),
        "share_of_starts_less_likely_than_greedy": float((ends > greedy).mean()),
        "bits_per_dim": bits | {METHOD: ends.tolist()},
        "ended": dict(Counter(ended for image in searched for ended in image["ended"])),
        "evaluations_per_start": float(np.mean([image["evaluations"] for image in searched])),
        "seconds_per_start": float(np.mean([image["seconds"] for image in searched])),
    }
