import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from art_pixeldefend import PixelCNNpp
from art_pixeldefend.models.training import Batches, Loss, Settings, train

SMALL = Settings(filters=4, resnets=1, mixtures=2, dropout=0.3, steps=60, batch_size=8, every=20, dataset="smooth")
SHAPE = (1, 6, 6)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def metrics(folder):
    """The lines of a run's metrics but for what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(make_levels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model = train(SMALL, make_levels(64, SHAPE), make_levels(16, SHAPE, seed=1), folder, verbose=False)
    return folder, model


def test_a_run_leaves_a_model_its_metrics_and_samples(uninterrupted):
    folder, model = uninterrupted
    names = {"model.safetensors", "metrics.jsonl", "samples.png", "checkpoint.safetensors"}
    assert {file.name for file in folder.iterdir()} == names
    loaded = PixelCNNpp.load(folder / "model.safetensors")
    assert loaded.provenance["dataset"] == "smooth" and loaded.provenance["steps"] == 60
    assert loaded.provenance["test_bits_per_dim"] == model.provenance["test_bits_per_dim"]


def test_training_lowers_the_loss_on_images_it_has_not_seen(uninterrupted):
    held_out = [line["held_out_bits_per_dim"] for line in metrics(uninterrupted[0]) if "held_out_bits_per_dim" in line]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import random_levels
from test_trainer import SHAPE, SMALL, train
import torch
torch.set_num_threads(1)
train(SMALL, random_levels(64, SHAPE), random_levels(16, SHAPE, seed=1), {folder!r}, resume=True, verbose=False)
"""


def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_one(uninterrupted, tmp_path):
    here = os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {here!r})" + SCRIPT.format(
        tests=os.path.dirname(here), folder=str(tmp_path)
    )
    chance, kills = random.Random(0), 0
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-c", code], env=ONE_THREAD)
        deadline = time.monotonic() + 120
        # Kill soon after the run shows a sign of life, three times; then let it finish.
        seen = _size(tmp_path)
        while process.poll() is None and (kills >= 3 or _size(tmp_path) == seen) and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            time.sleep(chance.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 1
    assert metrics(tmp_path) == metrics(uninterrupted[0])
    finished = PixelCNNpp.load(tmp_path / "model.safetensors")
    for one, other in zip(finished.parameters(), uninterrupted[1].parameters(), strict=True):
        assert torch.equal(one, other)


def _size(folder):
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def test_two_processes_train_one_model(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "art_pixeldefend",
        "train", "digits", "--out", str(tmp_path / "run"), "--filters", "4", "--resnets", "1", "--mixtures", "2",
        "--steps", "6", "--batch-size", "4", "--every", "3", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    model = PixelCNNpp.load(tmp_path / "run" / "model.safetensors")
    assert model.provenance["processes"] == 2
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 3, 6, 6]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_epoch_shows_every_image_once_to_one_rank(world):
    ranks = [Batches(24, 4, seed=5, rank=rank, world=world) for rank in range(world)]
    steps = 24 // (4 * world)
    for epoch in range(3):
        seen = torch.cat([rank(epoch * steps + step) for step in range(steps) for rank in ranks])
        assert seen.sort().values.tolist() == list(range(24))
    assert not torch.equal(ranks[0](0), ranks[0](steps))


def test_a_checkpoint_of_other_settings_is_not_resumed(uninterrupted, make_levels, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes((uninterrupted[0] / "checkpoint.safetensors").read_bytes())
    other = Settings(filters=4, resnets=1, mixtures=2, steps=61, batch_size=8, every=20)
    with pytest.raises(ValueError, match="resume"):
        train(other, make_levels(64, SHAPE), make_levels(4, SHAPE), tmp_path, resume=True, verbose=False)


def test_a_run_from_other_weights_is_not_resumed(uninterrupted, make_levels, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes((uninterrupted[0] / "checkpoint.safetensors").read_bytes())
    with pytest.raises(ValueError, match="started from other weights"):
        train(
            SMALL, make_levels(64, SHAPE), make_levels(4, SHAPE), tmp_path,
            start=uninterrupted[1], resume=True, verbose=False,
        )  # fmt: skip


def test_a_run_that_learns_nothing_gives_the_model_it_started_from(uninterrupted, make_levels, tmp_path):
    start = uninterrupted[1]
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    still = replace(SMALL, learning_rate=0, steps=2, dropout=0.1)
    model = train(still, make_levels(64, SHAPE), make_levels(4, SHAPE), tmp_path, start=start, verbose=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.configuration["dropout"] == 0.1 and model.provenance["start"] == start.provenance


def test_a_run_goes_on_learning_from_the_model_it_started_from(uninterrupted, make_levels, tmp_path):
    start = uninterrupted[1]
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    model = train(SMALL, make_levels(64, SHAPE), make_levels(16, SHAPE, seed=1), tmp_path, start=start, verbose=False)
    assert model.provenance["test_bits_per_dim"] < start.provenance["test_bits_per_dim"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


@pytest.mark.parametrize("size, shape", [({"filters": 8}, SHAPE), ({"resnets": 2}, SHAPE), ({}, (3, 6, 6))])
def test_a_start_of_another_size_is_refused(size, shape, uninterrupted, make_levels, tmp_path):
    with pytest.raises(ValueError, match="start"):
        train(
            replace(SMALL, **size), make_levels(8, shape), make_levels(1, shape), tmp_path,
            start=uninterrupted[1], verbose=False,
        )  # fmt: skip


def test_a_diverging_run_stops_with_the_step_and_the_remedy(make_levels, tmp_path, monkeypatch):
    """Weight normalisation and clamped scales keep the loss finite at any learning rate, so it is made to diverge."""
    whole = Loss.forward
    monkeypatch.setattr(Loss, "forward", lambda self, x: whole(self, x) * (torch.nan if x.sum() % 2 else 1))
    with pytest.raises(FloatingPointError, match="step 20; lower learning_rate"):
        train(SMALL, make_levels(64, SHAPE), make_levels(4, SHAPE), tmp_path, verbose=False)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("images", [np.zeros((0, 1, 6, 6)), np.zeros((4, 6, 6)), np.full((2, 1, 6, 6), 0.3)])
def test_images_that_are_no_levels_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="images"):
        train(SMALL, images, np.zeros((1, 1, 6, 6)), tmp_path, verbose=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"learning_rate": -1}, {"average": 2}, {"decay": -0.1}, {"batch_size": 1.5}, {"filters": 0},
        {"dropout": 3}, {"seed": "a"}, {"seed": 2**60}, {"learning_rate": None}, {"clip": float("nan")},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)


def test_settings_of_numpy_numbers_are_plain_ones():
    settings = Settings(filters=np.int64(4), learning_rate=np.float32(0.5), seed=np.int32(3))
    assert json.loads(json.dumps(asdict(settings))) == asdict(Settings(filters=4, learning_rate=0.5, seed=3))
