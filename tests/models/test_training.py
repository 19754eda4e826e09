import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from art_pixeldefend import PixelCNNpp
from art_pixeldefend.models import checkpoint, training
from art_pixeldefend.models.training import Batches, Settings, State, as_start

SHAPE = (1, 6, 6)
SMALL = Settings(steps=60, batch_size=8, every=20)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
HERE = Path(__file__).parent


def small_model(image_shape=SHAPE, images=None, **sizes):
    """A model whose weights are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PixelCNNpp(image_shape, **({"filters": 4, "resnets": 1, "mixtures": 2, "dropout": 0.3} | sizes))
    if images is not None:
        model.initialise(images)
    return model


def train(images, held_out, folder, settings=SMALL, model=None, **options):
    """Train a small model on the CPU."""
    if model is None:
        model = small_model(images.shape[1:], images)
    options = {"evaluate": PixelCNNpp.evaluate, "device": "cpu", "mixed_precision": True, "verbose": False} | options
    return training.train(model, PixelCNNpp.loss, images, settings, folder, held_out=held_out, **options)


def metrics(folder):
    """The lines of a run's metrics but for what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def images(make_levels):
    return make_levels(64, SHAPE), make_levels(16, SHAPE, seed=1)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(*images, folder)


@pytest.fixture(autouse=True)
def signals_take_effect():
    """SIGINT raises KeyboardInterrupt, even if the process that started the tests ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """A folder with the files of the uninterrupted run."""
    for file in uninterrupted[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def stop_after(steps, monkeypatch, number=signal.SIGINT):
    """Send the process a signal in the middle of a step."""
    whole = State.update

    def update(self, loss):
        if self.step == steps - 1:
            signal.raise_signal(number)
        whole(self, loss)

    monkeypatch.setattr(State, "update", update)


# A run


def test_a_signal_that_the_process_ignores_stops_no_run(images, uninterrupted, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop_after(33, monkeypatch)
    assert same_weights(train(*images, tmp_path), uninterrupted[1])


def test_a_run_leaves_a_model_a_checkpoint_and_metrics(uninterrupted):
    folder, model = uninterrupted
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "metrics.jsonl", "checkpoint.safetensors"}
    loaded = PixelCNNpp.load(folder / "model.safetensors")
    assert same_weights(loaded, model) and loaded.provenance == model.provenance
    assert loaded.provenance["steps"] == 60 and loaded.provenance["training_images"] == 64


def test_training_lowers_the_loss_on_images_it_has_not_seen(uninterrupted):
    held_out = [line["held_out_bits_per_dim"] for line in metrics(uninterrupted[0]) if "held_out_bits_per_dim" in line]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]


def test_the_last_evaluation_is_of_the_model_that_is_saved(uninterrupted):
    assert metrics(uninterrupted[0])[-1]["held_out_bits_per_dim"] == pytest.approx(
        uninterrupted[1].provenance["test_bits_per_dim"]
    )


def test_nothing_is_published_of_where_images_and_runs_are(images, tmp_path):
    model = train(*images, tmp_path / "a-secret-place", replace(SMALL, steps=1), provenance={"dataset": "smooth"})
    assert model.provenance["dataset"] == "smooth"
    for file in (tmp_path / "a-secret-place").iterdir():
        assert b"secret" not in file.read_bytes()


def test_training_leaves_torch_s_generator_and_modes_alone(images, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():
        train(*images, tmp_path, replace(SMALL, steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_does_not_depend_on_the_state_of_torch_around_it(images, uninterrupted, tmp_path):
    torch.manual_seed(12345)
    model = small_model(SHAPE, images[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        train(*images, tmp_path, model=model)
    assert metrics(tmp_path) == metrics(uninterrupted[0])


@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.bfloat16, "meta")])
def test_a_run_does_not_depend_on_default_dtype_and_device(dtype, device, images, tmp_path):
    def loss(model, batch):
        return model.loss(batch) * (1 + 0.1 * torch.rand(len(batch)).mean())

    def run(folder, model):
        training.train(model, loss, images[0], settings, folder, held_out=images[1], device="cpu",
                       evaluate=PixelCNNpp.evaluate, mixed_precision=False, verbose=False)  # fmt: skip
        return model

    settings = replace(SMALL, steps=3, flip=True)
    expected, model = run(tmp_path / "a", small_model()), small_model()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            run(tmp_path / "b", model)
            assert torch.get_default_device().type == device
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_weights(model, expected)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_flipping_mirrors_about_half_of_the_images(images, tmp_path):
    left = np.zeros((8, *SHAPE), np.uint8)
    left[..., :3] = 255
    seen = []

    def loss(model, batch):
        seen.append(batch.clone())
        return model.loss(batch)

    settings = replace(SMALL, steps=20, flip=True)
    training.train(small_model(), loss, left, settings, tmp_path, device="cpu", verbose=False)
    mirrored = torch.stack(seen)[..., -1].amax((2, 3)).flatten() == 255
    assert 0.3 < mirrored.double().mean() < 0.7
    assert {tuple(image.flatten().tolist()) for batch in seen for image in batch} == {
        tuple(left[0].flatten().tolist()), tuple(left[0, :, :, ::-1].flatten().tolist())
    }  # fmt: skip


def test_any_model_and_loss_can_be_trained(images, tmp_path, monkeypatch):
    """A model of another kind, with a buffer and a frozen parameter, and a loss and a measure that draw noise."""
    from art_pixeldefend.models import zoo
    from art_pixeldefend.models.base import ImageModel

    class Mean(ImageModel):
        kind = "mean"

        def __init__(self, image_shape):
            super().__init__()
            self.image_shape = tuple(image_shape)
            self.value = torch.nn.Parameter(torch.zeros(image_shape))
            self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

        def loss(self, x):
            self.batches += 1
            return (self.value * self.scale - x / 255 + 0.1 * torch.randn(x.shape)).square().mean()

        def evaluate(self, x):
            return {"rmse": (self.value - x / 255 + 0.1 * torch.randn(x.shape)).square().mean().sqrt().item()}

    monkeypatch.setitem(zoo.KINDS, "mean", (__name__, "Mean"))
    monkeypatch.setattr(zoo, "import_module", lambda name: __import__("types").SimpleNamespace(Mean=Mean))

    def run(folder, **options):
        return training.train(
            Mean(SHAPE), Mean.loss, images[0], settings, folder, held_out=images[1], evaluate=Mean.evaluate,
            device="cpu", verbose=False, **options,
        )  # fmt: skip

    settings = replace(SMALL, steps=120, every=40, learning_rate=0.05, average=0.9)
    model = run(tmp_path / "whole")
    assert (model.value - torch.from_numpy(images[0]).double().mean(0) / 255).abs().max() < 0.1
    assert model.provenance["test_rmse"] > 0 and zoo.load(tmp_path / "whole" / "model.safetensors").kind == "mean"
    with monkeypatch.context() as patch:
        stop_after(53, patch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    resumed = run(tmp_path / "stopped", resume=True)
    assert torch.equal(resumed.value, model.value) and resumed.batches == 120
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_a_diverging_run_stops_with_the_step_and_the_remedy_and_a_sound_checkpoint(images, tmp_path):
    def loss(model, batch):
        broken = steps[0] == 29
        steps[0] += 1
        return model.loss(batch) * (torch.nan if broken else 1)

    steps = [0]
    with pytest.raises(FloatingPointError, match="step 40; lower learning_rate"):
        training.train(small_model(), loss, images[0], SMALL, tmp_path, device="cpu", verbose=False)
    assert not (tmp_path / "model.safetensors").exists()
    tensors, header = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert header["step"] == 20 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_gradient_that_is_not_finite_stops_a_run_though_its_loss_is_finite(images, tmp_path):
    def loss(model, batch):
        return model.loss(batch) + (model.network.head.bias - model.network.head.bias.detach()).abs().sqrt().sum()

    with pytest.raises(FloatingPointError, match="step 1;"):
        settings = replace(SMALL, steps=1)
        training.train(small_model(), loss, images[0], settings, tmp_path, device="cpu", verbose=False)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("bad", [np.zeros((0, 1, 6, 6)), np.zeros((4, 6, 6)), np.full((2, 1, 6, 6), 0.3)])
def test_images_that_are_no_levels_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="images"):
        train(bad, None, tmp_path, model=small_model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_epoch_shows_every_image_once_to_one_rank(world):
    ranks = [Batches(24, 4, seed=5, rank=rank, world=world) for rank in range(world)]
    steps = 24 // (4 * world)
    for epoch in range(3):
        seen = torch.cat([rank(epoch * steps + step) for step in range(steps) for rank in ranks])
        assert seen.sort().values.tolist() == list(range(24))
    assert not torch.equal(ranks[0](0), ranks[0](steps))


# Interruptions


SCRIPT = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
from conftest import random_levels
from test_training import SHAPE, train
import torch
torch.set_num_threads(1)
train(random_levels(64, SHAPE), random_levels(16, SHAPE, seed=1), sys.argv[1], resume=True)
"""


def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_one(uninterrupted, tmp_path):
    chance, kills = random.Random(0), 0
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=ONE_THREAD)
        deadline = time.monotonic() + 120
        # Kill soon after the run shows a sign of life, twice; then let it finish.
        seen = _size(tmp_path)
        while process.poll() is None and (kills >= 2 or _size(tmp_path) == seen) and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            time.sleep(chance.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 1
    assert metrics(tmp_path) == metrics(uninterrupted[0])
    assert same_weights(PixelCNNpp.load(tmp_path / "model.safetensors"), uninterrupted[1])


def _size(folder):
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("step", [1, 33])
def test_a_run_stopped_by_ctrl_c_goes_on_from_where_it_stopped(step, images, uninterrupted, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(*images, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.read_header(tmp_path / "checkpoint.safetensors")["step"] == step
    assert same_weights(train(*images, tmp_path, resume=True), uninterrupted[1])
    assert metrics(tmp_path) == metrics(uninterrupted[0])


def test_sigterm_writes_a_checkpoint_before_it_takes_effect(images, tmp_path, monkeypatch):
    class TerminatedError(Exception):
        pass

    def handler(number, frame):
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        stop_after(7, monkeypatch, signal.SIGTERM)
        with pytest.raises(TerminatedError):
            train(*images, tmp_path)
    finally:
        assert signal.signal(signal.SIGTERM, before) is handler
    assert checkpoint.read_header(tmp_path / "checkpoint.safetensors")["step"] == 7


# Folders that hold a run


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "checkpoint.safetensors", "samples.png"])
def test_a_folder_with_a_run_in_it_is_refused_and_left_as_it_is(name, images, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=r"resume=True continues it, overwrite=True replaces it"):
        train(*images, tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "precious"}


def test_a_run_is_replaced_if_that_is_asked_for(images, copy):
    train(*images, copy, replace(SMALL, steps=2, seed=1), overwrite=True)
    assert metrics(copy)[-1]["step"] == 2
    assert checkpoint.read_header(copy / "checkpoint.safetensors")["settings"]["seed"] == 1


def test_temporary_files_of_killed_runs_are_removed_and_others_are_not(images, tmp_path):
    others = {
        "notes.txt", ".hidden", ".tmpnotes1", ".thesis.partial", ".checkpoint.safetensors.partial",
        ".thesis.00112233445566ff.partial", "checkpoint.safetensors.0123456789abcdef.partial",
    }  # fmt: skip
    for name in others | {f".{name}.0123456789abcdef.partial" for name in ("metrics.jsonl", "model.safetensors")}:
        (tmp_path / name).write_text("")
    for name in (".tmpfolde", ".checkpoint.safetensors.0123456789abcdef.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpA1b2C3").write_text("")
    train(*images, tmp_path, replace(SMALL, steps=1))
    names = {file.name for file in tmp_path.iterdir()} - {
        "model.safetensors",
        "metrics.jsonl",
        "checkpoint.safetensors",
    }
    assert names == others | {".tmpfolde"}


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_samples_in_a_folder_without_a_run_are_left_as_they_are(options, images, tmp_path):
    (tmp_path / "samples.png").write_text("precious")
    with pytest.raises(ValueError, match=r"samples\.png"):
        train(*images, tmp_path, **options)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"samples.png": "precious"}


def test_a_finished_model_is_not_replaced_by_a_run_that_begins_anew(images, copy):
    (copy / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match=r"finished model, but no checkpoint"):
        train(*images, copy, resume=True)
    with pytest.raises(ValueError, match=r"exclude each other"):
        train(*images, copy, resume=True, overwrite=True)


# Resuming


@pytest.mark.parametrize("change", [{"learning_rate": 3e-3}, {"batch_size": 4}, {"seed": 1}, {"flip": True}])
def test_resuming_with_another_setting_is_refused_by_its_name(change, images, copy):
    (name, value), before = next(iter(change.items())), (copy / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"{name} was .*, now it is {value}\..*--start-from"):
        train(*images, copy, replace(SMALL, **change), resume=True)
    assert (copy / "checkpoint.safetensors").read_bytes() == before


def test_resuming_a_model_of_another_size_is_refused_by_the_argument(images, copy):
    with pytest.raises(ValueError, match=r"dropout was 0.3, now it is 0.1"):
        train(*images, copy, model=small_model(dropout=0.1), resume=True)
    with pytest.raises(ValueError, match=r"filters was 4, now it is 5"):
        train(*images, copy, model=small_model(filters=5), resume=True)


def test_resuming_on_other_images_is_refused(images, copy, make_levels):
    with pytest.raises(ValueError, match=r"training_images was 64, now it is 32"):
        train(images[0][:32], images[1], copy, resume=True)
    with pytest.raises(ValueError, match=r"training_images_sha256 was"):
        train(images[0][::-1].copy(), images[1], copy, resume=True)
    with pytest.raises(ValueError, match=r"image_shape was \[1, 6, 6\], now it is \[1, 9, 7\]"):
        train(make_levels(77, (1, 9, 7)), None, copy, resume=True)


def test_resuming_in_another_precision_is_refused_and_the_run_s_own_is_the_default(images, tmp_path, monkeypatch):
    train(*images, tmp_path, replace(SMALL, steps=2), mixed_precision=True)
    with pytest.raises(ValueError, match=r"mixed_precision was True, now it is False"):
        train(*images, tmp_path, resume=True, mixed_precision=False)
    monkeypatch.setattr(training, "bf16_pays", lambda device: False)
    model = train(*images, tmp_path, replace(SMALL, steps=3), resume=True, mixed_precision=None)
    assert model.provenance["mixed_precision"] is True


def test_resuming_from_other_weights_is_refused(uninterrupted, images, copy):
    with pytest.raises(ValueError, match=r"start was None"):
        train(*images, copy, start=uninterrupted[1], resume=True)


def test_a_run_is_extended_and_evaluated_more_often_in_another_folder(images, copy, tmp_path):
    folder = copy.rename(tmp_path.with_name("moved"))
    model = train(*images, folder, replace(SMALL, steps=80, every=10), resume=True)
    assert model.provenance["steps"] == 80
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [20, 40, 50, 60, 70, 80]
    with pytest.raises(ValueError, match=r"steps must be at least 80"):
        train(*images, folder, replace(SMALL, steps=70), resume=True)


def extended(images, folder, settings, *steps):
    """A run that is extended to each of these numbers of steps."""
    for i, number in enumerate(steps):
        model = train(*images, folder, replace(settings, steps=number), resume=i > 0)
    return model


@pytest.mark.parametrize("settings", [replace(SMALL, decay=0), replace(SMALL, decay=0.1, warmup=100)])
def test_a_run_extended_before_its_learning_rate_falls_is_the_longer_run(settings, images, tmp_path):
    longer = train(*images, tmp_path / "longer", replace(settings, steps=6))
    model = extended(images, tmp_path / "extended", settings, 2, 4, 6)
    assert same_weights(model, longer)
    assert "segments" not in model.provenance and model.provenance == longer.provenance


def test_a_run_extended_after_its_learning_rate_fell_records_its_segments(images, tmp_path, monkeypatch):
    settings = replace(SMALL, warmup=0, decay=0.6)
    model = extended(images, tmp_path, settings, 2, 4)
    assert not same_weights(model, train(*images, tmp_path / "longer", replace(settings, steps=4)))
    segments = [{"steps": 2, "until": 2}, {"steps": 4, "until": 4}]
    assert model.provenance["segments"] == segments
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(*images, tmp_path, replace(settings, steps=7), resume=True)
    path = tmp_path / "checkpoint.safetensors"
    stopped = [*segments, {"steps": 7, "until": 5}]
    assert checkpoint.read_header(path)["segments"] == stopped
    assert as_start(path, PixelCNNpp).provenance["segments"] == stopped
    model = train(*images, tmp_path, replace(settings, steps=7), resume=True)
    assert model.provenance["segments"] == [*segments, {"steps": 7, "until": 7}]
    assert PixelCNNpp.load(tmp_path / "model.safetensors").provenance == model.provenance


def test_resuming_with_another_loss_is_refused_by_its_name(images, copy):
    def other(model, batch):
        return model.loss(batch)

    with pytest.raises(ValueError, match=r"loss was 'PixelCNNpp\.loss', now it is '.*other'"):
        training.train(small_model(), other, images[0], SMALL, copy, resume=True, device="cpu", verbose=False)


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_broken_checkpoint_is_refused(content, images, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        train(*images, tmp_path, resume=True)


def test_a_model_in_the_place_of_a_checkpoint_is_refused(images, uninterrupted, tmp_path):
    uninterrupted[1].save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"not a checkpoint of a training run"):
        train(*images, tmp_path, resume=True)


def in_the_format_of_version_0_1(path, settings, start=None):
    """Rewrite a checkpoint as ``State.save`` of version 0.1.0 wrote it."""
    tensors, header = checkpoint.read(path)
    names = [name.removeprefix("average.") for name in tensors if name.startswith("average.")]
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    old = {f"parameter.{i}": tensors[f"model.{name}"] for i, name in enumerate(names)}
    old |= {f"average.{i}": tensors[f"average.{name}"] for i, name in enumerate(names)}
    for i, name in enumerate(names):
        old |= {f"optimizer.{i}.{key}": tensors[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    sizes = {name: getattr(model, name) for name in ("filters", "resnets", "mixtures", "dropout")}
    run = {name: value for name, value in asdict(settings).items() if name != "flip"}
    header = {"step": header["step"], "settings": sizes | run | {"dataset": "some/folder"}, "start": start}
    save_file(old, path, metadata={"art_pixeldefend": json.dumps(header)})


def test_a_checkpoint_of_version_0_1_goes_on_as_an_uninterrupted_run(images, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(40, patch)
        with pytest.raises(KeyboardInterrupt):
            train(*images, tmp_path)
    in_the_format_of_version_0_1(tmp_path / "checkpoint.safetensors", SMALL)
    resume = partial(train, *images, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.002, now it is 0\.1"):
        resume(replace(SMALL, learning_rate=0.1))
    with pytest.raises(ValueError, match=r"filters was 4, now it is 6"):
        resume(model=small_model(filters=6))
    with pytest.raises(ValueError, match=r"flip was False"):
        resume(replace(SMALL, flip=True))
    with pytest.raises(ValueError, match=r"start was None"):
        resume(start=uninterrupted[1])
    assert same_weights(resume(), uninterrupted[1])
    assert metrics(tmp_path) == metrics(uninterrupted[0])


def test_a_run_starts_from_a_checkpoint_of_version_0_1(uninterrupted, copy):
    path = copy / "checkpoint.safetensors"
    in_the_format_of_version_0_1(path, SMALL)
    start = as_start(path, PixelCNNpp, SHAPE)
    assert same_weights(start, uninterrupted[1]) and start.configuration == uninterrupted[1].configuration
    assert start.provenance["steps"] == SMALL.steps and "start" not in start.provenance
    with pytest.raises(ValueError, match=r"image_shape must be given for '.*checkpoint"):
        as_start(path, PixelCNNpp)


# Starting from other weights


def test_a_run_that_learns_nothing_gives_the_model_it_started_from(uninterrupted, images, tmp_path):
    start = uninterrupted[1]
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    still = replace(SMALL, learning_rate=0, steps=2)
    model = train(*images, tmp_path, still, model=small_model(dropout=0.1), start=start)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.configuration["dropout"] == 0.1 and model.provenance["start"] == start.provenance


def test_a_run_goes_on_learning_from_the_model_it_started_from(uninterrupted, images, tmp_path):
    start = uninterrupted[1]
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    model = train(*images, tmp_path, start=start)
    assert model.provenance["test_bits_per_dim"] < start.provenance["test_bits_per_dim"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_what_a_run_started_from_is_recorded_also_where_that_was_a_checkpoint(images, tmp_path):
    once, dataset = replace(SMALL, steps=1), {"dataset": "smooth"}
    train(*images, tmp_path / "a", once, provenance=dataset)
    start = as_start(tmp_path / "a" / "checkpoint.safetensors", PixelCNNpp)
    assert start.provenance["dataset"] == "smooth" and "start" not in start.provenance
    train(*images, tmp_path / "b", once, start=start)
    start = as_start(tmp_path / "b" / "checkpoint.safetensors", PixelCNNpp)
    model = train(*images, tmp_path / "c", once, start=start)
    assert model.provenance["start"]["start"]["dataset"] == "smooth"
    counts = [run["training_images"] for run in (model.provenance, start.provenance, start.provenance["start"])]
    assert counts == [64, 64, 64]


def test_a_run_starts_from_the_averaged_weights_of_a_checkpoint(uninterrupted):
    folder, model = uninterrupted
    start = as_start(folder / "checkpoint.safetensors", PixelCNNpp)
    assert same_weights(start, model) and start.fingerprint() == model.fingerprint()
    assert same_weights(as_start(str(folder / "model.safetensors"), PixelCNNpp), model)
    assert as_start(model, PixelCNNpp) is model
    with pytest.raises(FileNotFoundError, match="--start-from must be"):
        as_start("nonsense", PixelCNNpp, name="--start-from")


@pytest.mark.parametrize(
    "size, shape", [({"filters": 8}, SHAPE), ({"resnets": 2}, SHAPE), ({}, (3, 6, 6)), ({}, (1, 6, 7))]
)
def test_a_start_of_another_size_is_refused(size, shape, uninterrupted, make_levels, tmp_path):
    with pytest.raises(ValueError, match="start"):
        train(make_levels(8, shape), None, tmp_path, model=small_model(shape, **size), start=uninterrupted[1])


# Several processes


JOINT = Settings(steps=6, batch_size=8, every=3, learning_rate=0.01, warmup=0, average=0.5)
SHARED = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
from dataclasses import replace
from conftest import random_levels
from test_training import JOINT, SHAPE, small_model, train
import torch
torch.set_num_threads(1)
from art_pixeldefend.processes import process_group
group = process_group()
images, held_out = random_levels(64, SHAPE), random_levels(15, SHAPE, seed=1)
settings = replace(JOINT, batch_size=4)
model = small_model(SHAPE, images, dropout=0.0)
if group.rank == 1:  # the weights of rank 0 count
    torch.nn.init.zeros_(model.network.head.gain)
train(images, held_out, sys.argv[1], replace(settings, steps=3), model=model, mixed_precision=False)
model = small_model(dropout=0.0)
folder = sys.argv[1] if group.rank == 0 else sys.argv[1] + "-of-another-machine"
model = train(images, held_out, folder, settings, model=model, mixed_precision=False, resume=True)
prints = group.gather(model.fingerprint())
assert prints[0] == prints[1], prints
"""


def test_two_processes_have_the_parameters_of_one_on_the_joint_batch_also_after_resuming(images, make_levels, tmp_path):
    """Twice in one torchrun job; the second time only rank 0 has the checkpoint."""
    script = tmp_path / "script.py"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "two")], env=ONE_THREAD, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = {}
    for batch_size in (4, 8):
        folder, model = tmp_path / f"one-{batch_size}", small_model(SHAPE, images[0], dropout=0.0)
        for steps in (3, 6):
            settings = replace(JOINT, batch_size=batch_size, steps=steps)
            train(
                images[0],
                make_levels(15, SHAPE, seed=1),
                folder,
                settings,
                model=model,
                mixed_precision=False,
                resume=True,
            )
        weights[batch_size] = model.state_dict()
    two = PixelCNNpp.load(tmp_path / "two" / "model.safetensors")
    assert two.provenance["processes"] == 2
    to_joint, from_half = (
        sum((tensor - weights[size][name]).abs().sum() for name, tensor in two.state_dict().items()) for size in (8, 4)
    )
    assert to_joint < 0.01 * from_half
    for line, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one-8"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    with pytest.raises(ValueError, match=r"processes was 2, now it is 1"):
        train(
            images[0], None, tmp_path / "two", replace(JOINT, batch_size=4), model=model, mixed_precision=False,
            resume=True,
        )  # fmt: skip


# Settings


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"learning_rate": -1}, {"average": 2}, {"decay": -0.1}, {"batch_size": 1.5}, {"flip": 1},
        {"seed": "a"}, {"seed": 2**60}, {"learning_rate": None}, {"clip": float("nan")},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)


def test_settings_of_numpy_numbers_are_plain_ones():
    settings = Settings(steps=np.int64(4), learning_rate=np.float32(0.5), seed=np.int32(3))
    assert json.loads(json.dumps(asdict(settings))) == asdict(Settings(steps=4, learning_rate=0.5, seed=3))


@pytest.mark.parametrize("verbose", [False, True])
def test_compilation_in_the_first_step_is_announced_if_verbose(verbose, images, tmp_path, capfd):
    numba = pytest.importorskip("numba")

    def loss(model, batch):
        numba.njit(lambda x: x + 1)(1)  # compiled at every step
        return PixelCNNpp.loss(model, batch)

    settings = replace(SMALL, steps=2)
    training.train(small_model(), loss, images[0], settings, tmp_path, device="cpu", verbose=verbose)
    assert capfd.readouterr().err.count("compiling for this processor") == verbose
