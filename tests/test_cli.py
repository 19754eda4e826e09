import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from art_pixeldefend import cli, datasets
from art_pixeldefend.density.pretrained import names


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path, digits):
    path = tmp_path / "in.npy"
    np.save(path, digits.x_test[:12, 0])
    return path


def test_every_command_explains_itself():
    for command in ("train", "purify", "score", "detect", "sample", "demo", "grid"):
        result = run(command, "--help")
        assert result.exit_code == 0 and "Usage" in result.output


def test_purify_writes_the_purified_array_in_the_form_of_the_input(images, tmp_path, digits_model):
    from art_pixeldefend import greedy_decode

    result = run("purify", images, tmp_path / "out.npy", "--model", "digits", "--eps", 24, "--quiet")
    assert result.exit_code == 0, result.output
    expected = greedy_decode(digits_model, np.load(images)[:, None], 24)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected[:, 0])


def test_purify_refuses_an_output_before_the_work_is_done(images, tmp_path, monkeypatch):
    monkeypatch.setattr("art_pixeldefend.defences.purifier.as_pixel_cnn", lambda *_, **__: pytest.fail("too late"))
    result = run("purify", images, tmp_path / "out.txt", "--model", "digits", "--quiet")
    assert isinstance(result.exception, ValueError) and "out.txt" in str(result.exception)
    assert not (tmp_path / "out.txt").exists()


def test_help_names_every_bundled_model():
    assert ", ".join(names()) == cli.BUNDLED


@pytest.mark.parametrize("command", ["score", "detect"])
def test_a_folder_is_refused_as_a_table_before_the_work_is_done(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr("art_pixeldefend.defences.purifier.as_pixel_cnn", lambda *_, **__: pytest.fail("too late"))
    result = run(command, images, "--model", "digits", "--out", tmp_path, "--quiet")
    assert result.exit_code == 2 and "--out" in result.output


def test_score_prints_the_mean_and_writes_each_image(images, tmp_path, digits_model):
    result = run("score", images, "--model", "digits", "--out", tmp_path / "bits.csv", "--quiet")
    assert result.exit_code == 0, result.output
    bits = digits_model.bits_per_dim(np.load(images)[:, None]).numpy()
    assert f"{bits.mean():.4f} bits/dim" in result.output
    rows = list(csv.DictReader((tmp_path / "bits.csv").open()))
    np.testing.assert_allclose([float(row["bits_per_dim"]) for row in rows], bits, rtol=1e-6)


def two_processes(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "art_pixeldefend", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_processes_share_the_images_and_give_the_same(images, tmp_path):
    alone = run("score", images, "--model", "digits", "--out", tmp_path / "alone.csv", "--quiet")
    together = two_processes("score", images, "--model", "digits", "--out", tmp_path / "together.csv")
    assert together.returncode == 0, together.stderr[-2000:]
    assert together.stdout == alone.output and "2 processes" in together.stderr
    one, other = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines())) for name in ("alone", "together")
    )
    assert [row["image"] for row in one] == [row["image"] for row in other]
    bits = ([float(row["bits_per_dim"]) for row in rows] for rows in (one, other))
    np.testing.assert_allclose(*bits, atol=1e-5)


def test_a_process_without_images_does_no_harm(images, tmp_path):
    few = tmp_path / "few.npy"
    np.save(few, np.load(images)[:1])
    assert run("purify", few, tmp_path / "alone.npy", "--model", "digits", "--quiet").exit_code == 0
    together = two_processes("purify", few, tmp_path / "together.npy", "--model", "digits", "--quiet")
    assert together.returncode == 0, together.stderr[-2000:]
    np.testing.assert_array_equal(np.load(tmp_path / "alone.npy"), np.load(tmp_path / "together.npy"))


def test_detect_scores_the_training_images_once(images, tmp_path, monkeypatch):
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--likelihoods", tmp_path / "l.st"]
    assert run(*arguments, "--training", "digits", "--quiet").exit_code == 0
    first = (tmp_path / "p.csv").read_text()
    monkeypatch.setattr(datasets, "load", lambda *_: pytest.fail("the kept likelihoods should do"))
    result = run(*arguments, "--quiet")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.csv").read_text() == first
    rows = list(csv.DictReader(first.splitlines()))
    assert len(rows) == 12 and all(0 < float(row["p_value"]) <= 1 for row in rows)
    assert all((float(row["p_value"]) <= 0.05) == (row["adversarial"] == "1") for row in rows)


@pytest.mark.parametrize("name", ["sheet.png", "x.npz"])
def test_sample_writes_a_sheet_or_an_array(name, tmp_path):
    result = run("sample", "--model", "digits", "--out", tmp_path / name, "--count", 3)
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["purify", "nowhere", "out", "--model", "digits"], "nowhere"),
        (["score", "nowhere.npy", "--model", "digits"], "nowhere.npy"),
        (["score", "digits", "--model", "imagenet"], "--model must be"),
        (["sample", "--model", "nowhere.safetensors", "--out", "x.png"], "--model must be"),
        (["train", "digits", "--out", "run", "--start-from", "imagenet"], "--start-from must be"),
        (["train", "digits", "--out", "run", "--device", "nonsense"], "device must be"),
        (["sample", "--model", "digits", "--out", "x.gif"], "--out"),
        (["detect", "digits", "--model", "digits", "--out", "x.csv"], "--training"),
        (["grid", "imagenet", "--out", "table"], "digits"),
        (["grid", "digits", "--out", "table", "--model", "imagenet"], "--model must be"),
        (["train", "fashion-mnist", "--out", "run", "--data-dir", "nowhere", "--steps", "0"], "steps"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "art_pixeldefend", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and expected in done.stderr
    assert not list(tmp_path.iterdir())
