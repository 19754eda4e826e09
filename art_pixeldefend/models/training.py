"""Training a PixelCNN++ by maximum likelihood: one run on one page.

A run lives in a folder: ``metrics.jsonl`` (a line per logging step), ``checkpoint.safetensors`` (everything a resumed
run needs) and, at the end, ``model.safetensors`` (the averaged weights) and ``samples.png``. Nothing random depends on
what happened before a step: the batch and the dropout of step t are functions of (seed, t, rank), so a run killed at
any moment and resumed has the losses of one that was left alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from art_pixeldefend import __version__
from art_pixeldefend.datasets import FINGERPRINT, fingerprint
from art_pixeldefend.devices import bf16_pays
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models import checkpoint
from art_pixeldefend.models.gradients import gradients_of
from art_pixeldefend.models.pixelcnnpp.model import PixelCNNpp
from art_pixeldefend.pictures import write_sheet
from art_pixeldefend.validation import check_count, check_device, check_number, check_probability

CHECKPOINT, METRICS, MODEL, SAMPLES = "checkpoint.safetensors", "metrics.jsonl", "model.safetensors", "samples.png"
LOG_EVERY = 50  # steps a line of metrics
MOST_SEED = 2**32 - 1  # what is made of it for an epoch and a step must be a seed of torch's


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run, but for the images.

    Args:
        filters, resnets, mixtures, dropout: of the model, as in :class:`PixelCNNpp`.
        steps: optimiser steps.
        batch_size: images a step and process.
        learning_rate: Adam's, at its highest.
        warmup: steps over which the learning rate rises from 0.
        decay: the last part of the run, over which it falls linearly to 0 (1: from the start; 0: never).
        average: decay of the exponential moving average of the weights, which evaluation uses.
        clip: largest norm of the gradient.
        seed: of initial weights, order of the images, and dropout.
        every: steps between held-out evaluations, each with a checkpoint.
        dataset: a name for the record.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    filters: int = 40
    resnets: int = 5
    mixtures: int = 10
    dropout: float = 0.5
    steps: int = 10_000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.6
    average: float = 0.9995
    clip: float = 1.0
    seed: int = 0
    every: int = 1_000
    dataset: str = ""

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[str, Any], float]] = {
            **dict.fromkeys(("filters", "resnets", "mixtures", "steps", "batch_size", "every"), check_count),
            **dict.fromkeys(("learning_rate", "clip"), check_number),
            **dict.fromkeys(("decay", "average"), partial(check_number, high=1)),
            "dropout": check_probability,
            "warmup": partial(check_count, least=0),
            "seed": partial(check_count, least=0, most=MOST_SEED),
        }
        for name, check in checks.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))  # a plain number, which JSON can hold

    def learning_rate_at(self, step: int) -> float:
        """Of the step with this number, counted from 0."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.learning_rate * min(1.0, rising, falling)

    def average_decay_at(self, step: int) -> float:
        """Smaller at first, so that the average forgets the initial weights."""
        return min(self.average, (1 + step) / (10 + step))


class Loss(nn.Module):
    """Bits per dimension of a batch of levels: a module of its own, because DDP synchronises through ``forward``."""

    def __init__(self, model: PixelCNNpp, mixed_precision: bool) -> None:
        super().__init__()
        self.model, self.mixed_precision = model, mixed_precision

    def forward(self, x: Tensor) -> Tensor:
        """Levels (N, C, H, W) to a number."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed_precision):
            return -self.model.sub_pixel_log_probs(x).mean() / math.log(2)


class State:
    """What changes from step to step: the model, its average, the optimiser, the number of steps done."""

    def __init__(self, model: PixelCNNpp, settings: Settings, start: str | None = None) -> None:
        self.model, self.settings, self.start, self.step = model, settings, start, 0
        self.parameters: list[Tensor] = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate, betas=(0.95, 0.9995), fused=True)

    def update(self) -> None:
        """One optimiser step on the gradients that are there, and the average after it."""
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.settings.average_decay_at(self.step))
        self.step += 1

    @contextmanager
    def averaged(self) -> Iterator[PixelCNNpp]:
        """The model in evaluation mode with its averaged weights, for as long as the context lasts."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad(), self.model.evaluating():
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield self.model
            finally:
                torch._foreach_copy_(self.parameters, kept)

    def save(self, path: Path) -> None:
        """Write everything :meth:`load` needs."""
        tensors = {f"parameter.{i}": tensor for i, tensor in enumerate(self.parameters)}
        tensors |= {f"average.{i}": tensor for i, tensor in enumerate(self.average)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        checkpoint.write(path, tensors, {"step": self.step, "settings": asdict(self.settings), "start": self.start})

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not a checkpoint of a run with these settings and this start.
        """
        tensors, header = checkpoint.read(path)
        if header.get("settings") != asdict(self.settings):
            raise ValueError(f"resume: {str(path)!r} is from a run with other settings: {header.get('settings')}")
        if header.get("start") != self.start:
            raise ValueError(f"resume: {str(path)!r} is from a run that started from other weights")
        try:
            with torch.no_grad():
                for i, (parameter, average) in enumerate(zip(self.parameters, self.average, strict=True)):
                    parameter.copy_(tensors[f"parameter.{i}"])
                    average.copy_(tensors[f"average.{i}"])
            moments = {i: self._moments(tensors, i) for i in range(len(self.parameters))}
            self.step = int(header["step"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"resume: {str(path)!r} does not fit this model and these images: {error}") from error
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def _moments(self, tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
        """Adam's state of a parameter, in the parameter's own memory layout: the fused step pairs them as they lie."""
        like = self.parameters[i]
        names = ("exp_avg", "exp_avg_sq")
        moments = {name: torch.empty_like(like).copy_(tensors[f"optimizer.{i}.{name}"]) for name in names}
        return moments | {"step": tensors[f"optimizer.{i}.step"]}


class Batches:
    """Which images a rank sees at a step: a fresh permutation every epoch, a function of (seed, step, rank) alone."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size,) into the images."""
        first = (step * self.world + self.rank) * self.batch_size
        return torch.stack(
            [self._order(at // self.count)[at % self.count] for at in range(first, first + self.batch_size)]
        )

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = torch.randperm(self.count, generator=generator)
        return self._epochs[epoch]


class Log:
    """``metrics.jsonl``: a JSON object a line. Lines after the step a run resumes from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if step and path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, **values: float) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def evaluate(model: PixelCNNpp, images: Tensor) -> float:
    """Mean bits per dimension of levels ``images``."""
    return model.bits_per_dim(images).mean().item()


def train(
    settings: Settings,
    images: np.ndarray | Tensor,
    held_out: np.ndarray | Tensor,
    folder: str | PathLike[str],
    *,
    start: PixelCNNpp | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    mixed_precision: bool | None = None,
    verbose: bool = True,
) -> PixelCNNpp:
    """Train a model on levels ``images`` and leave the run in ``folder``.

    Under ``torchrun`` every process calls this with the same arguments; gradients are averaged (NCCL on GPUs, gloo on
    CPUs), rank 0 writes.

    Args:
        settings: of model and run.
        images: levels (N, C, H, W) to train on.
        held_out: levels (M, C, H, W); the first 512 are evaluated during the run, all at its end.
        folder: where the run lives.
        start: a model of the size in ``settings``; the run begins with its weights, which stay as they are.
        resume: go on from the folder's checkpoint, if it has one.
        device: where to train; the process's GPU where there is one.
        mixed_precision: bf16 autocast; by default where the hardware has it.
        verbose: show a progress bar.

    Returns:
        The model with averaged weights, in evaluation mode, its ``provenance`` filled in.

    Raises:
        ValueError: for images that are not levels, or too few; for a ``start`` of another size; for a device that is
            not there; or, resuming, a checkpoint of another run.
        FloatingPointError: if the loss stops being finite. The last checkpoint stays.
    """
    with _processes() as (rank, world):
        own = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        device = check_device("device", own if device is None else device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _Run(settings, images, held_out, Path(folder), start, rank, world, device, mixed_precision).go(
                resume, verbose
            )


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, world size); under ``torchrun`` joins the other processes, unless the caller has done so already."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


class _Run:
    """The parts of one run in one process, put together."""

    def __init__(self, settings, images, held_out, folder, start, rank, world, device, mixed_precision) -> None:
        if getattr(images, "ndim", 0) != 4 or not len(images):
            raise ValueError(
                f"images must be levels (N, C, H, W) with N > 0, got shape {getattr(images, 'shape', None)}"
            )
        torch.manual_seed(settings.seed)
        self.settings, self.folder, self.rank, self.world, self.device = settings, folder, rank, world, device
        self.model = PixelCNNpp(
            tuple(images.shape[1:]), settings.filters, settings.resnets, settings.mixtures, settings.dropout
        )
        self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images = self.model.as_levels(images, "images")
        self.held_out = self.model.as_levels(held_out, "held_out")
        self.mixed_precision = bf16_pays(device) if mixed_precision is None else mixed_precision
        self._begin_with(start)
        self.start = start
        loss = Loss(self.model, self.mixed_precision)
        self.gradients = gradients_of(nn.parallel.DistributedDataParallel(loss) if world > 1 else loss, device)
        self.state = State(self.model, settings, None if start is None else start.fingerprint())
        self.batches = Batches(len(self.images), settings.batch_size, settings.seed, rank, world)

    def _begin_with(self, start: PixelCNNpp | None) -> None:
        if start is None:
            self.model.initialise(self.images[:100])
            return
        here, there = ({**model.configuration, "dropout": None} for model in (self.model, start))
        if here != there:
            raise ValueError(f"start must be of the size in settings and of these images, {here}, got {there}")
        self.model.load_state_dict(start.state_dict())

    def go(self, resume: bool, verbose: bool) -> PixelCNNpp:
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and (self.folder / CHECKPOINT).exists():
            self.state.load(self.folder / CHECKPOINT)
        log = Log(self.folder / METRICS, self.state.step) if self.rank == 0 else None
        self.model.train()
        bar = tqdm(
            total=self.settings.steps, initial=self.state.step, unit="step", disable=not verbose or self.rank > 0
        )
        losses: list[Tensor] = []
        began = time.perf_counter()
        while self.state.step < self.settings.steps:
            losses.append(self._step())
            bar.update()
            step, every = self.state.step, self.settings.every
            if step % LOG_EVERY == 0 or step % every == 0 or step == self.settings.steps:
                mean = torch.stack(losses).mean().item()
                rate = len(losses) * self.settings.batch_size * self.world / (time.perf_counter() - began)
                bar.set_postfix_str(f"{mean:.3f} bits/dim, {rate:.0f} images/s")
                if not math.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} at step {step}; lower learning_rate")
                if log:
                    log.write(step=step, bits_per_dim=mean, images_per_second=round(rate, 1))
                    if step % every == 0:
                        self._checkpoint(log)
                losses, began = [], time.perf_counter()
        bar.close()
        return self._finish()

    def _checkpoint(self, log: Log) -> None:
        if len(self.held_out):
            with self.state.averaged() as model:
                log.write(step=self.state.step, held_out_bits_per_dim=evaluate(model, self.held_out[:512]))
        self.state.save(self.folder / CHECKPOINT)

    def _step(self) -> Tensor:
        step, settings = self.state.step, self.settings
        batch = self.images[self.batches(step).to(self.device)]
        torch.manual_seed((settings.seed * 1_000_003 + step) * self.world + self.rank)  # dropout
        loss = self.gradients(batch.contiguous(memory_format=torch.channels_last))
        self.state.update()
        return loss

    def _finish(self) -> PixelCNNpp:
        with torch.no_grad():
            torch._foreach_copy_(self.state.parameters, self.state.average)
        self.model.eval()
        self.model.provenance = asdict(self.settings) | {
            "version": __version__,
            "torch": torch.__version__,
            "processes": self.world,
            "mixed_precision": self.mixed_precision,
            "training_images": len(self.images),
            FINGERPRINT: fingerprint(self.images.cpu().numpy()),
            "held_out_images": len(self.held_out),
        }
        if self.start is not None:
            self.model.provenance["start"] = self.start.provenance
        if self.rank == 0:
            if len(self.held_out):
                self.model.provenance["test_bits_per_dim"] = evaluate(self.model, self.held_out)
            self.model.save(self.folder / MODEL)
            write_sheet(self.folder / SAMPLES, self.model.sample(16, seed=self.settings.seed).cpu().numpy())
        return self.model
