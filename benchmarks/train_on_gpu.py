"""Train the largest density model that a GPU can in a given time, and write its weights as it goes.

    python benchmarks/train_on_gpu.py --measure --filters 96 --resnets 5
    python benchmarks/train_on_gpu.py --out FOLDER --minutes 8.5 --filters 96 --resnets 5

The first command measures the speed on random images. The second checks gradients and speed, chooses the number of
steps that fit the time, and trains. After every evaluation it writes ``weights.json`` and the averaged weights in half
precision, as files of at most 16 MiB: ``cat FOLDER/weights.safetensors.* > model.safetensors`` joins them.
``--start-from model.safetensors`` goes on from weights, with a new learning-rate schedule. SIGINT ends a run early.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from timing import conditions

from art_pixeldefend import PixelCNNpp, datasets
from art_pixeldefend.files import write_atomically
from art_pixeldefend.models.gradients import gradients_of
from art_pixeldefend.models.training import Settings, State, as_start, train
from art_pixeldefend.precision import bf16_pays

PIECE = 16 * 2**20 - 1  # bytes
WEIGHTS = "weights.safetensors"


def main(
    out: Annotated[Path, typer.Option(help="folder of the run and the weights")] = Path("gpu-run"),
    data: Annotated[str, typer.Option(help="data set: a name or a path")] = "cifar-10",
    data_dir: Annotated[Path | None, typer.Option(envvar="ART_PIXELDEFEND_DATA")] = None,
    minutes: Annotated[float, typer.Option(help="time for everything, from start to end")] = 8.5,
    filters: int = 64,
    resnets: int = 5,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    dropout: float = 0.0,
    evaluations: Annotated[int, typer.Option(help="during training")] = 5,
    start_from: Annotated[str | None, typer.Option(help="weights to go on from: a bundled name or a file")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure the speed for some seconds, and stop")] = False,
    device: str = "cuda",
) -> None:
    """Measure, or check, measure and train."""
    began, place = time.perf_counter(), torch.device(device)
    images = None if measure else datasets.load(data, data_dir)
    levels = (
        torch.randint(256, (512, 3, 32, 32)).to(torch.uint8) if images is None else torch.from_numpy(images.x_train)
    )
    start = as_start(start_from, PixelCNNpp) if start_from else None
    shape = tuple(levels.shape[1:])
    sizes = start.configuration if start else {"image_shape": shape, "filters": filters, "resnets": resnets}
    torch.manual_seed(0)
    model = PixelCNNpp(**sizes | {"dropout": dropout})
    model.load_state_dict(start.state_dict()) if start else model.initialise(levels[:100])
    facts: dict[str, Any] = {**conditions(place), "configuration": model.configuration, "batch_size": batch_size}
    facts["bf16_gradient_cosine"] = gradient_cosine(model.to(place), levels[:16].to(place))
    facts |= speed(model, levels[torch.randint(len(levels), (batch_size,))].to(place), seconds=20 if measure else 8)
    print(json.dumps(facts), flush=True)
    if not facts["bf16_gradient_cosine"] > 0.98:
        raise SystemExit("gradients under bf16 differ from those of float32")
    if not facts["loss_after"] < facts["loss_before"]:
        raise SystemExit("the loss of a batch that is repeated does not fall")
    if images is None:
        return
    # The speed was measured without evaluations, checkpoints and the final evaluation of all held-out images.
    left = 60 * minutes - (time.perf_counter() - began)
    steps = max(1, int(0.88 * left * facts["images_per_second"] / batch_size))
    settings = Settings(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, every=-(-steps // (evaluations + 1)),
        flip=False, average=0.999 if steps < 10_000 else 0.9995,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PixelCNNpp(**model.configuration)
    model.initialise(levels[:100])

    def evaluate(model: PixelCNNpp, x: torch.Tensor) -> Mapping[str, float]:
        results = model.evaluate(x)
        minutes_taken = (time.perf_counter() - began) / 60
        write_pieces(out, model, facts | results | {"images": len(x), "steps": steps, "minutes": minutes_taken})
        print(json.dumps({**results, "images": len(x), "minutes": round(minutes_taken, 2)}), flush=True)
        return results

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(max(1, int(60 * minutes - (time.perf_counter() - began))))  # if the speed was overestimated
    train(
        model, PixelCNNpp.loss, levels, settings, out, held_out=images.x_test, evaluate=evaluate, start=start,
        provenance={"dataset": data, "split": "train"}, overwrite=True, device=place, verbose=False,
    )  # fmt: skip
    signal.alarm(0)
    write_pieces(out, model, facts | {"provenance": model.provenance, "minutes": (time.perf_counter() - began) / 60})


def gradient_cosine(model: PixelCNNpp, batch: torch.Tensor) -> float:
    """The cosine between the gradients of the loss with and without bf16 autocast; 1 where bf16 is not used."""

    def gradient(enabled: bool) -> torch.Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=enabled):
            parts = torch.autograd.grad(model.loss(batch), list(model.parameters()))
        return torch.cat([part.flatten().double() for part in parts])

    return torch.cosine_similarity(gradient(bf16_pays(batch.device)), gradient(False), dim=0).item()


def speed(model: PixelCNNpp, batch: torch.Tensor, seconds: float) -> dict[str, float]:
    """Images per second of training steps on one batch, and its loss before and after. The model is trained by it."""
    device = batch.device
    model = model.to(memory_format=torch.channels_last).train()
    state = State(model, replace(Settings(), warmup=0))

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        torch.clear_autocast_cache()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_pays(device)):
            return model.loss(batch)

    gradients = gradients_of(loss_of, model, device)

    def step() -> float:
        loss = gradients(batch.contiguous(memory_format=torch.channels_last))
        state.update(loss)
        return loss.item()  # waits for a GPU

    first, began, steps = step(), time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds or not steps:
        last = step()
        steps += 1
    return {"images_per_second": steps * len(batch) / elapsed, "loss_before": first, "loss_after": last}


def write_pieces(folder: Path, model: PixelCNNpp, facts: Mapping[str, Any]) -> None:
    """Write ``weights.json`` and the weights in half precision as ``weights.safetensors.00``, ``.01``, ..."""
    whole = folder / WEIGHTS
    model.save(whole, dtype=torch.float16)
    content = whole.read_bytes()
    for i, at in enumerate(range(0, len(content), PIECE)):
        whole.with_suffix(f".safetensors.{i:02}").write_bytes(content[at : at + PIECE])
    whole.unlink()
    write_atomically(folder / "weights.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
