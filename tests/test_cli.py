import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import art_pixeldefend.detectors  # noqa: F401  (binds as_model before a test replaces it)
from art_pixeldefend import PixelDefendDetector, cli, datasets
from art_pixeldefend.models.zoo import names


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
    monkeypatch.setattr("art_pixeldefend.PixelDefend.__call__", lambda *_, **__: pytest.fail("too late"))
    for name in ("out.txt", "in.npy/out.npy"):
        result = run("purify", images, tmp_path / name, "--model", "digits", "--quiet")
        assert isinstance(result.exception, ValueError) and name in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


@pytest.mark.parametrize(
    ("command", "option"),
    [("score", "--out"), ("detect", "--out"), ("detect", "--likelihoods"), ("sample", "--out")],
)
def test_files_that_cannot_be_written_are_refused_before_the_work_is_done(
    command, option, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("art_pixeldefend.models.zoo.as_model", lambda *_, **__: pytest.fail("too late"))
    options = {"--out": tmp_path / "x.csv"} if command == "detect" else {}
    options = {"--model": "digits"} | options | {option: images / "x.npy"}
    result = run(
        command, *([] if command == "sample" else [images]), *(word for pair in options.items() for word in pair)
    )
    assert isinstance(result.exception, ValueError) and "in.npy/x.npy" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


def test_purify_leaves_images_below_the_threshold_alone(images, tmp_path, digits_model):
    bits = digits_model.bits_per_dim(np.load(images)[:, None]).numpy()
    threshold = float(np.median(bits))
    arguments = ["purify", images, "--model", "digits", "--eps", 24, "--quiet"]
    for name, some in (("all", 0), ("unlikely", threshold)):
        result = run(*arguments[:2], tmp_path / f"{name}.npy", *arguments[2:], "--threshold", some)
        assert result.exit_code == 0, result.output
    purified, expected = np.load(tmp_path / "all.npy"), np.load(images)
    expected[bits >= threshold] = purified[bits >= threshold]
    np.testing.assert_array_equal(np.load(tmp_path / "unlikely.npy"), expected)
    assert (expected != purified).any()


def test_help_names_every_bundled_model():
    assert ", ".join(names("pixelcnnpp")) == cli.BUNDLED


@pytest.mark.parametrize("command", ["score", "detect"])
def test_a_folder_is_refused_as_a_table_before_the_work_is_done(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr("art_pixeldefend.models.zoo.as_model", lambda *_, **__: pytest.fail("too late"))
    result = run(command, images, "--model", "digits", "--out", tmp_path, "--quiet")
    assert result.exit_code == 2 and "--out" in result.output


def test_score_prints_the_mean_and_writes_each_image(images, tmp_path, digits_model):
    result = run("score", images, "--model", "digits", "--out", tmp_path / "bits.csv", "--quiet")
    assert result.exit_code == 0, result.output
    bits = digits_model.bits_per_dim(np.load(images)[:, None]).numpy()
    assert f"{bits.mean():.4f} bits/dim" in result.output
    rows = list(csv.DictReader((tmp_path / "bits.csv").open()))
    np.testing.assert_allclose([float(row["bits_per_dim"]) for row in rows], bits, rtol=1e-6)


def test_the_score_of_no_images_is_refused(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8), np.uint8))
    result = run("score", tmp_path / "none.npy", "--model", "digits", "--quiet")
    assert isinstance(result.exception, ValueError) and "none.npy" in str(result.exception)


def test_arrays_of_the_models_own_number_of_channels_go_from_command_to_command(tmp_path, make_model):
    make_model((2, 6, 5)).save(tmp_path / "model.safetensors")
    model = ["--model", tmp_path / "model.safetensors"]
    assert run("sample", *model, "--out", tmp_path / "x.npy", "--count", 3).exit_code == 0
    assert run("score", tmp_path / "x.npy", *model, "--quiet").exit_code == 0
    assert run("purify", tmp_path / "x.npy", tmp_path / "y.npy", *model, "--quiet").exit_code == 0
    assert np.load(tmp_path / "x.npy").shape == np.load(tmp_path / "y.npy").shape == (3, 2, 6, 5)
    result = run("score", tmp_path / "x.npy", "--model", "digits", "--quiet")
    assert isinstance(result.exception, ValueError) and "x.npy" in str(result.exception)
    result = run("sample", *model, "--out", tmp_path / "x.png")
    assert isinstance(result.exception, ValueError) and "--out" in str(result.exception)


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
    alpha = float(np.median([float(row["p_value"]) for row in rows]))
    result = run(*arguments, "--quiet", "--alpha", alpha)
    assert f"level {alpha:g}" in result.output
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert 6 <= sum(row["adversarial"] == "1" for row in rows) < 12
    assert all((float(row["p_value"]) <= alpha) == (row["adversarial"] == "1") for row in rows)


def test_kept_likelihoods_are_used_from_where_nothing_may_be_written(images, tmp_path, monkeypatch):
    kept = tmp_path / "kept" / "l.st"
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--likelihoods", kept, "--quiet"]
    assert run(*arguments, "--training", "digits").exit_code == 0
    monkeypatch.setattr("os.access", lambda folder, mode: folder != kept.parent)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    kept.unlink()
    result = run(*arguments, "--training", "digits")
    assert isinstance(result.exception, ValueError) and "l.st" in str(result.exception)


def test_detect_says_that_kept_likelihoods_go_before_training_images(images, tmp_path):
    kept = tmp_path / "l.st"
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--likelihoods", kept, "--quiet"]
    assert run(*arguments, "--training", "digits").stderr == ""
    assert run(*arguments).stderr == ""
    said = run(*arguments, "--training", "fashion-mnist").stderr
    assert said.count("\n") == 1 and "--training fashion-mnist" in said and str(kept) in said


def test_detect_compares_with_images_that_the_model_has_not_seen(digits, digits_model, tmp_path):
    arguments = ["detect", "digits", "--model", "digits", "--out", tmp_path / "p.csv", "--quiet"]
    assert "200 calibration images" in run(*arguments, "--calibration", "digits").output
    found = [float(row["p_value"]) for row in csv.DictReader((tmp_path / "p.csv").open())]
    detector = PixelDefendDetector(digits_model, (0, 255))
    detector.fit(digits.calibration(digits_model).x)
    np.testing.assert_allclose(found, detector.detect(digits.test(digits_model).x)[0]["p_values"])
    np.save(tmp_path / "clean.npy", digits.x_test[200:230])  # other images are used as they are
    assert "30 calibration images" in run(*arguments, "--calibration", tmp_path / "clean.npy").output


def test_detect_takes_the_held_out_images_of_the_folder_that_the_model_was_trained_on(digits, tmp_path):
    folder, model = tmp_path / "photos", tmp_path / "run" / "model.safetensors"
    folder.mkdir()
    for i, image in enumerate(digits.x_train[:240]):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    size = ["--filters", 4, "--resnets", 1, "--steps", 1, "--batch-size", 4, "--device", "cpu"]
    assert run("train", folder, "--out", model.parent, *size, "--quiet").exit_code == 0
    arguments = ["detect", folder, "--out", tmp_path / "p.csv", "--calibration", folder, "--quiet"]
    assert "compared with 21 calibration images" in run(*arguments, "--model", model).output
    assert "compared with 240 calibration images" in run(*arguments, "--model", "digits").output


def test_detect_refuses_images_too_few_to_flag_any_and_likelihoods_of_other_images(images, tmp_path):
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--quiet"]
    refused = run(*arguments, "--calibration", images)
    assert isinstance(refused.exception, ValueError) and "at least 19 images" in str(refused.exception)
    assert not (tmp_path / "p.csv").exists()
    arguments += ["--likelihoods", tmp_path / "l.st"]
    assert run(*arguments, "--training", "digits").exit_code == 0
    refused = run(*arguments, "--calibration", "digits")
    assert isinstance(refused.exception, ValueError) and "training images" in str(refused.exception)


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
        (["detect", "digits", "--model", "digits", "--out", "x.csv"], "--calibration"),
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
