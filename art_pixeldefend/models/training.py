"""Train an image model of any kind: one run in one folder.

The folder holds ``metrics.jsonl`` (one JSON object a line), ``checkpoint.safetensors`` (everything that a resumed run
needs) and, at the end, ``model.safetensors`` (the averaged weights). The images of step t and the randomness of its
loss depend only on (seed, t, rank), so a run that is killed at any moment and resumed computes what it would have
computed without the interruption.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from art_pixeldefend import __version__
from art_pixeldefend.datasets import FINGERPRINT, SAMPLE, fingerprint, sample
from art_pixeldefend.files import (
    CHECKPOINT,
    METRICS,
    MODEL,
    RUN_FILES,
    SAMPLES,
    check_file,
    remove_temporaries,
    write_atomically,
)
from art_pixeldefend.models import checkpoint, zoo
from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.models.gradients import Gradients, all_reduce, gradients_of
from art_pixeldefend.models.pixelcnnpp.compilation import compilation_notice
from art_pixeldefend.precision import bf16_pays, default_float32
from art_pixeldefend.processes import ProcessGroup, process_group
from art_pixeldefend.validation import check_attributes, check_bool, check_count, check_device, check_number

LOG_EVERY = 50  # steps between two lines of metrics
EVALUATED = 512  # held-out images that are evaluated during a run; at its end all are
MAX_SEED = 2**32 - 1  # seeds of epochs and steps are derived from it and must fit into 64 bits
BETAS = (0.95, 0.9995)  # Adam's, as in PixelCNN++
MAY_CHANGE = ("steps", "every")  # settings that a resumed run may have other values of

Model = TypeVar("Model", bound=ImageModel)
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Settings of a training run. The model has its own, and the images are given separately.

    Args:
        steps: optimiser steps.
        batch_size: images per step and process.
        learning_rate: the highest learning rate of Adam.
        warmup: steps over which the learning rate rises from 0.
        decay: fraction of the run, at its end, over which the learning rate falls linearly to 0; 0 for a constant one.
        average: decay of the exponential moving average of the weights, which is evaluated and saved.
        clip: largest norm of the gradient.
        seed: seed of the order of the images and of the randomness in the loss, such as dropout.
        every: steps between held-out evaluations, each followed by a checkpoint.
        flip: mirror each image horizontally with probability 1/2.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    steps: int = 10_000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.6
    average: float = 0.9995
    clip: float = 1.0
    seed: int = 0
    every: int = 1_000
    flip: bool = False

    def __post_init__(self) -> None:
        check_attributes(self, check_count, "steps", "batch_size", "every")  # plain numbers, which JSON can hold
        check_attributes(self, check_number, "learning_rate", "clip")
        check_attributes(self, check_number, "decay", "average", high=1)
        check_attributes(self, check_count, "warmup", least=0)
        check_attributes(self, check_count, "seed", least=0, most=MAX_SEED)
        check_bool("flip", self.flip)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.learning_rate * min(1.0, rising, falling)

    def average_decay_at(self, step: int) -> float:
        """Decay of the moving average at a step; smaller at first, so that the initial weights are forgotten."""
        return min(self.average, (1 + step) / (10 + step))


def train(
    model: Model,
    loss: Callable[[Model, Tensor], Tensor],
    images: np.ndarray | Tensor,
    settings: Settings,
    folder: str | PathLike[str],
    *,
    held_out: np.ndarray | Tensor | None = None,
    evaluate: Callable[[Model, Tensor], Mapping[str, float]] | None = None,
    start: Model | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    mixed_precision: bool | None = None,
    verbose: bool = True,
) -> Model:
    """Train ``model`` in place by Adam and leave the run in ``folder``.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint. Torch's global random generators are left
    as they were. Under ``torchrun`` every process calls this with the same arguments; gradients are averaged, and
    rank 0 writes.

        >>> import tempfile
        >>> from art_pixeldefend import PixelCNNpp, datasets
        >>> from art_pixeldefend.models.training import Settings, train
        >>> data = datasets.load("digits")
        >>> model = PixelCNNpp(data.image_shape, filters=4, resnets=1, mixtures=2)
        >>> model.initialise(data.x_train[:100])
        >>> settings = Settings(steps=2, batch_size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train(model, PixelCNNpp.loss, data.x_train, settings, folder, verbose=False)
        >>> model.provenance["steps"]
        2

    Args:
        model: the model, with its initial weights; those of rank 0 are used.
        loss: a function of the model, in training mode, and of a batch of levels (N, C, H, W), uint8, on the model's
            device, to a scalar. It may draw from torch's global generators.
        images: levels (N, C, H, W) to train on.
        settings: settings of the run.
        folder: where the run is stored.
        held_out: levels (M, C, H, W); the first 512 are evaluated during the run, all at its end.
        evaluate: a function of the model with averaged weights, in evaluation mode, and of held-out levels to named
            numbers. They become ``held_out_NAME`` in the metrics and ``test_NAME`` in the provenance.
        start: a model of the same kind and size; the run begins with its weights, and its provenance is recorded.
        provenance: entries to add to the provenance of the trained model, for example the name of the data set.
        resume: continue from the checkpoint in ``folder``, if there is one. It must be of the same model, settings,
            images, number of processes, precision, start and name of the loss; only ``steps`` and ``every`` may
            differ. The code of the loss, ``evaluate``, held-out images, device and version of torch are not compared.
            With ``decay`` 0 a run of more steps continues as if it had had them from the beginning. With another
            ``decay`` the learning rate of the earlier steps depended on their number; if it was not that of the longer
            run, checkpoint and provenance list as ``segments`` the number of ``steps`` that applied ``until`` a step.
            Checkpoints of version 0.1.0 are continued, too, with the sizes and settings of their run; they do not
            record images, processes, precision and loss.
        overwrite: replace a run in ``folder``.
        device: where to train; by default the GPU of this process, or the CPU on machines without one.
        mixed_precision: compute the loss under bf16 autocast; by default as in the checkpoint that is resumed, else
            where the hardware multiplies bf16 matrices.
        verbose: show a progress bar.

    Returns:
        ``model`` with averaged weights, in evaluation mode, its ``provenance`` filled in.

    Raises:
        ValueError: for images that are not levels, or none; a ``start`` of another kind or size; a device that does not
            exist; a checkpoint of another run; a folder that holds a run, without ``resume`` or ``overwrite``.
        FloatingPointError: if the loss or the gradient becomes NaN or infinite. The last checkpoint remains.
    """
    if getattr(images, "ndim", 0) != 4 or not len(images):
        raise ValueError(f"images must be levels (N, C, H, W) with N > 0, got shape {getattr(images, 'shape', None)}")
    group, folder = process_group(), Path(folder)
    device = check_device("device", group.device if device is None else device)
    header = _on_rank_0(group, lambda: _header(folder, resume, overwrite))
    with _isolated(device):
        model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        levels = model.as_levels(images, "images")
        if start is not None:
            _copy_weights(start, model)
        if mixed_precision is None:
            mixed_precision = (header or {}).get("run", {}).get("mixed_precision", bf16_pays(device))
        run: dict[str, dict[str, Any]] = {
            "model": {"kind": model.kind, **model.configuration},
            "settings": asdict(settings),
            "run": {
                "training_images": len(levels),
                FINGERPRINT: fingerprint(levels.cpu().numpy()),
                "processes": group.world_size,
                "mixed_precision": mixed_precision,
                "start": None if start is None else start.fingerprint(),
                "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
            },
        }
        known = {
            **(provenance or {}),
            SAMPLE: sample(levels.cpu().numpy()),
            **({} if start is None else {"start": start.provenance}),
        }
        state = State(model, settings)
        if header is not None:
            _on_rank_0(group, lambda: state.load(folder / CHECKPOINT, run))
        _broadcast(group, state)

        def loss_of(batch: Tensor) -> Tensor:
            torch.clear_autocast_cache()  # inside the caller's autocast, it holds casts of the weights of earlier steps
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                return loss(model, batch)

        trainer = _Trainer(
            group=group,
            state=state,
            gradients=gradients_of(loss_of, model, device),
            images=levels,
            held_out=levels[:0] if held_out is None else model.as_levels(held_out, "held_out"),
            evaluate=evaluate,
            folder=folder,
            header={**run, "provenance": known},
        )
        if group.rank == 0:
            _clear(folder, overwrite)
        trainer.train(verbose)
        state.take_average()
        model.eval()
        model.provenance = {
            **_provenance({**trainer.header, **state.progress()}),
            "held_out_images": len(trainer.held_out),
            "version": __version__,
            "torch": torch.__version__,
            **{f"test_{name}": value for name, value in trainer.evaluation(trainer.held_out).items()},
        }
        if group.rank == 0:
            model.save(folder / MODEL)
    return model


def check_run_folder(folder: str | PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a run may be stored in ``folder``.

    Raises:
        ValueError: if there is a run in it that is neither to be resumed nor to be replaced, or that cannot be resumed;
            if nothing can be written there.
    """
    if resume and overwrite:
        raise ValueError("resume=True and overwrite=True exclude each other")
    folder = Path(folder)
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if resume and CHECKPOINT not in found and (finished := [name for name in (MODEL, SAMPLES) if name in found]):
        raise ValueError(
            f"resume: {str(folder)!r} holds {' and '.join(finished)} of a finished model, but no {CHECKPOINT} to "
            "continue from"
        )
    if found and not resume and not overwrite:
        raise ValueError(
            f"{str(folder)!r} already holds a run ({', '.join(found)}): resume=True continues it, "
            "overwrite=True replaces it"
        )
    check_file(folder / METRICS, overwrite=True)


def as_start(
    value: Any, cls: type[Model], image_shape: tuple[int, int, int] | None = None, *, name: str = "start"
) -> Model:
    """A model that a run can begin with: what :func:`.zoo.as_model` accepts, or the path of a run's checkpoint.

    Of a checkpoint these are the averaged weights.

    Args:
        value: the model, its name or path, or the path of a checkpoint.
        cls: the class that is needed.
        image_shape: (C, H, W) of the images to train on; checkpoints of version 0.1.0 do not record it.
        name: of the argument, for messages.

    Raises:
        ValueError: if it is not a model of class ``cls``; the message names the argument ``name``.
        FileNotFoundError: if it is a path without a file.
    """
    try:
        is_run = isinstance(value, (str, PathLike)) and zoo.is_run(checkpoint.read_header(value))
    except (ValueError, OSError):
        is_run = False
    if not is_run:
        return zoo.as_model(value, cls, "cpu", name=name)
    tensors, header = _read_run(value, image_shape)
    configuration = dict(header["model"])
    if (kind := configuration.pop("kind")) != cls.kind:
        raise ValueError(f"{name} must be of kind {cls.kind!r}, but {str(value)!r} is a run of kind {kind!r}")
    weights = {part: _under(f"{part}.", tensors) for part in ("model", "average")}
    model = cls.from_tensors(configuration, weights["model"] | weights["average"])
    model.provenance = {**_provenance(header), "steps": header["step"]}
    return model


def _provenance(header: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a model that was trained in the run with this header."""
    run = {name: value for name, value in header["run"].items() if name != "start"}
    segments = {"segments": header["segments"]} if "segments" in header else {}
    return {**header.get("provenance", {}), **header["settings"], **run, **segments}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class State:
    """Everything that changes from step to step: the model, the average of its weights, the optimiser."""

    def __init__(self, model: ImageModel, settings: Settings) -> None:
        self.model, self.settings, self.step = model, settings, 0
        self.parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self.average = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.losses: list[Tensor] = []  # of the steps since the last line of metrics
        self.earlier: list[dict[str, int]] = []  # segments of the run, under other numbers of steps
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=BETAS, fused=True)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def update(self, loss: Tensor) -> None:
        """Take one optimiser step with the gradients in the parameters, and record the loss they belong to."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        self.losses.append(torch.where(norm.isfinite(), loss, torch.nan))
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()),
                list(self.parameters.values()),
                1 - self.settings.average_decay_at(self.step),
            )
        self.step += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights for the duration of the context."""
        kept = [parameter.detach().clone() for parameter in self.parameters.values()]
        self.take_average()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self.parameters.values()), kept)

    @torch.no_grad()
    def take_average(self) -> None:
        """Give the model its averaged weights."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.average.values()))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, by name, as they are in memory."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Write everything that :meth:`load` needs; ``header`` describes the run."""
        losses = {"losses": torch.stack(self.losses)} if self.losses else {}
        checkpoint.write(path, self.tensors() | losses, {"kind": checkpoint.RUN, **self.progress(), **header})

    def progress(self) -> dict[str, Any]:
        """The steps taken, and the segments of the run if its learning rate followed several numbers of steps."""
        segments = [*self.earlier, {"steps": self.settings.steps, "until": self.step}]
        return {"step": self.step, **({"segments": segments} if self.earlier else {})}

    def load(self, path: Path, run: Mapping[str, Any]) -> None:
        """Continue from the state in a file that :meth:`save` wrote.

        Raises:
            ValueError: if the file is not a checkpoint, or of a run that differs from ``run``; the message names what
                differs.
        """
        if not zoo.is_run(checkpoint.read_header(path)):
            raise ValueError(f"resume: {str(path)!r} is not a checkpoint of a training run")
        tensors, header = _read_run(path, self.model.image_shape)
        if different := _differences(header, json.loads(json.dumps(run))):
            raise ValueError(
                f"resume: {str(path)!r} is of another run: {'; '.join(different)}. Use its values, or begin "
                f"a new run in another folder, with this file as its start (--start-from) to keep the weights"
            )
        if header["step"] > self.settings.steps:
            raise ValueError(f"resume: steps must be at least {header['step']}, the step of {str(path)!r}")
        try:
            with torch.no_grad():
                for name, tensor in self.tensors().items():
                    tensor.copy_(tensors[name])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"resume: {str(path)!r} does not fit this model: {error}") from error
        self.losses = list(tensors["losses"].to(self.model.device)) if "losses" in tensors else []
        self.step = header["step"]
        self.earlier = _earlier_segments(header, self.settings)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two descriptions of runs, as JSON, disagree on, as far as both mention it."""
    found = []
    for section, values in now.items():
        for name, value in values.items():
            old = before.get(section, {}).get(name, value)
            equal = math.isclose(old, value, rel_tol=1e-9) if {type(old), type(value)} == {float} else old == value
            if not equal and name not in MAY_CHANGE:
                found.append(f"{name} was {old!r}, now it is {value!r}")
    return found


def _earlier_segments(header: Mapping[str, Any], settings: Settings) -> list[dict[str, int]]:
    """The segments of the run of a checkpoint before the one that ``settings`` begin or continue.

    There are none if the learning rates of all its steps were those of ``settings``.
    """
    segments = header.get("segments") or [{"steps": header["settings"]["steps"], "until": header["step"]}]
    begin = 0
    for segment in segments:
        then = replace(settings, steps=segment["steps"])
        if any(then.learning_rate_at(i) != settings.learning_rate_at(i) for i in range(begin, segment["until"])):
            return segments[:-1] if segments[-1]["steps"] == settings.steps else segments
        begin = segment["until"]
    return []


def _read_run(
    path: str | PathLike[str], image_shape: tuple[int, int, int] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a checkpoint; one of version 0.1.0, which only PixelCNN++ models had, in today's format.

    The latter mentions neither images, processes, precision nor loss.
    """
    tensors, header = checkpoint.read(path)
    if "format" in header:
        return tensors, header
    if image_shape is None:
        raise ValueError(f"image_shape must be given for {str(path)!r}, a checkpoint of version 0.1.0")
    settings = {**header["settings"], "flip": False}
    configuration: dict[str, Any] = {"image_shape": list(image_shape)}
    configuration |= {name: settings.pop(name) for name in ("filters", "resnets", "mixtures", "dropout")}
    del settings["dataset"]
    with torch.device("meta"):
        names = [name for name, _ in zoo.class_of("pixelcnnpp")(**configuration).named_parameters()]
    renamed = {}
    for name, tensor in tensors.items():
        part, i, *rest = name.split(".")
        renamed[".".join(["model" if part == "parameter" else part, names[int(i)], *rest])] = tensor
    model = {"kind": "pixelcnnpp", **configuration}
    sections = {"model": model, "settings": settings, "run": {"start": header["start"]}}
    return renamed, {"kind": checkpoint.RUN, "step": header["step"], **sections}


class Batches:
    """The images that a rank uses at a step: a new permutation every epoch, a function of (seed, step, rank) alone."""

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
    """``metrics.jsonl``: one JSON object a line. Lines after the step that a run resumes from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if step and path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, **values: float) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


class Interruption:
    """Note SIGINT and SIGTERM while the context lasts, so that a step is completed before they take effect."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there Python allows handlers to be set
            for number in self.SIGNALS:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number

    def take_effect(self) -> None:
        """Restore the handlers and deliver the signal. If that returns, or there was none, raise KeyboardInterrupt."""
        self.__exit__()
        if self.received is not None:
            signal.raise_signal(self.received)
        raise KeyboardInterrupt


@dataclass
class _Trainer:
    """The training loop of one process."""

    group: ProcessGroup
    state: State
    gradients: Gradients
    images: Tensor
    held_out: Tensor
    evaluate: Callable[[Any, Tensor], Mapping[str, float]] | None
    folder: Path
    header: Mapping[str, Any]

    def train(self, verbose: bool) -> None:
        """Take the remaining steps, with metrics, held-out evaluations and checkpoints.

        Raises:
            FloatingPointError: if the loss or the gradient becomes NaN or infinite.
            KeyboardInterrupt: after a SIGINT in any process, or what else a signal's handler raises.
        """
        group, state, settings = self.group, self.state, self.state.settings
        log = Log(self.folder / METRICS, state.step) if group.rank == 0 else None
        batches = Batches(len(self.images), settings.batch_size, settings.seed, group.rank, group.world_size)
        state.model.train()
        began, first = time.perf_counter(), state.step
        hidden = not verbose or group.rank > 0
        with Interruption() as interruption, tqdm(
            total=settings.steps, initial=state.step, unit="step", disable=hidden
        ) as bar:  # fmt: skip
            while state.step < settings.steps:
                with nullcontext() if hidden or state.step > first else compilation_notice():
                    self._step(self.images[batches(state.step).to(self.images.device)])
                bar.update()
                save = state.step % settings.every == 0 or state.step == settings.steps
                line = save or state.step % LOG_EVERY == 0
                stop = self._any(interruption.received is not None)
                if not (line or stop):
                    continue
                mean = torch.stack(state.losses).mean().item()
                if not math.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} at step {state.step}; lower learning_rate")
                if line:
                    images = (state.step - first) * settings.batch_size * group.world_size
                    rate = images / (time.perf_counter() - began)
                    bar.set_postfix_str(f"loss {mean:.3f}, {rate:.0f} images/s")
                    if log:
                        log.write(step=state.step, loss=mean, images_per_second=round(rate, 1))
                    state.losses = []
                if save:
                    with state.averaged():
                        values = self.evaluation(self.held_out[:EVALUATED])
                    if log and values:
                        log.write(step=state.step, **{f"held_out_{name}": value for name, value in values.items()})
                if (save or stop) and group.rank == 0:
                    state.save(self.folder / CHECKPOINT, self.header)
                group.wait()
                if stop:
                    bar.write(f"stopped after step {state.step} with a checkpoint")
                    interruption.take_effect()
                began, first = time.perf_counter(), state.step

    def _step(self, batch: Tensor) -> None:
        settings, step, group = self.state.settings, self.state.step, self.group
        _seed(batch.device, (settings.seed * 1_000_003 + step) * group.world_size + group.rank)
        if settings.flip:
            mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
            batch = torch.where(mirrored.to(batch.device), batch.flip(-1), batch)
        loss = self.gradients(batch.contiguous(memory_format=torch.channels_last)).float()
        gradients = [p.grad for p in self.state.parameters.values() if p.grad is not None]
        all_reduce([*gradients, loss], group.world_size)
        self.state.update(loss)

    def _any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.group.world_size == 1:
            return flag
        device = "cpu" if "cpu" in dist.get_backend_config() else self.images.device
        flags = torch.tensor([flag], dtype=torch.int32, device=device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def evaluation(self, images: Tensor) -> dict[str, float]:
        """Named results of the model for held-out images, which rank 0 computes."""
        evaluate = self.evaluate
        if evaluate is None or not len(images):
            return {}
        model = self.state.model
        _seed(images.device, self.state.settings.seed)
        with torch.no_grad(), model.evaluating():
            return _on_rank_0(self.group, lambda: dict(evaluate(model, images)))


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Make ``device`` current, record gradients, with torch's own defaults; restore all, and random generators."""
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(default_float32())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if cuda:
            stack.enter_context(torch.cuda.device(device))
        yield


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generator of the CPU and that of ``device``; unlike ``torch.manual_seed``, of no other GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _header(folder: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The header of the checkpoint to resume, if there is one; raises what :func:`check_run_folder` raises."""
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    path = folder / CHECKPOINT
    return checkpoint.read_header(path) if resume and path.exists() else None


def _clear(folder: Path, overwrite: bool) -> None:
    """Make the folder; remove temporary files of killed runs, and the files of a run that is to be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        remove_temporaries(folder / name)
        if overwrite and name != METRICS:  # which is written anew at once
            (folder / name).unlink(missing_ok=True)


def _copy_weights(start: ImageModel, model: ImageModel) -> None:
    try:
        if type(start) is not type(model) or start.image_shape != model.image_shape:
            raise RuntimeError("another kind or image shape")
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"start must be a {type(model).__name__} of the size of the model, {model.configuration}, "
            f"got {getattr(start, 'configuration', start)!r}"
        ) from error


def _on_rank_0(group: ProcessGroup, function: Callable[[], T]) -> T:
    """The result of a function that only rank 0 calls; its ValueError or OSError is raised in every process."""
    value, error = None, None
    if group.rank == 0:
        try:
            value = function()
        except (ValueError, OSError) as caught:
            error = caught
    value, error = group.gather((value, error))[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _broadcast(group: ProcessGroup, state: State) -> None:
    """Give every process the state of rank 0."""
    if group.world_size == 1:
        return
    device = state.model.device
    state.step, state.earlier, losses = _on_rank_0(
        group, lambda: (state.step, state.earlier, [loss.cpu() for loss in state.losses])
    )
    state.losses = [loss.to(device) for loss in losses]
    with torch.no_grad():
        for tensor in state.tensors().values():
            flat = tensor.flatten().clone()
            dist.broadcast(flat, 0)
            tensor.copy_(flat.view(tensor.shape))
