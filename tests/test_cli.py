import csv
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import art_pixeldefend.detectors  # binds as_model before a test replaces it
from art_pixeldefend import PixelDefendDetector, cli, datasets, greedy_decode
from art_pixeldefend.levels import UNIT, from_levels
from art_pixeldefend.models.zoo import KINDS, load, names


def run(*arguments):
    """The result of a command in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    """The standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments):
    """The error of a command that must fail with one line and exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
    return result.stderr


@pytest.fixture
def images(tmp_path, digits):
    path = tmp_path / "in.npy"
    np.save(path, digits.x_test[:12, 0])
    return path


@pytest.fixture
def training(tmp_path, digits):
    path = tmp_path / "in.npz"
    np.savez(path, x_train=digits.x_train[:100])
    return path


@pytest.mark.parametrize("command", cli.app.registered_commands, ids=lambda command: command.callback.__name__)
def test_every_command_has_help_with_examples_that_it_accepts(command):
    name = command.callback.__name__
    assert succeeds(name, "-h") == succeeds(name, "--help")
    examples = [line.strip() for line in succeeds(name, "-h").splitlines() if line.startswith(" art-pixeldefend")]
    assert examples == re.findall("art-pixeldefend .*", command.epilog)  # none is too long for a line
    for example in examples:
        _, used, *arguments = shlex.split(example)
        assert used == name
        typer.main.get_command(cli.app).commands[name].make_context(name, arguments)


def test_the_program_says_its_version_and_what_it_can_do():
    assert succeeds("--version") == f"art-pixeldefend {art_pixeldefend.__version__}\n"
    assert "purify" in succeeds() == succeeds("-h") == succeeds("--help")


def test_help_and_import_are_fast():
    """Heavy modules are imported by the commands that use them; the limits are 0.5 s and 0.2 s on an idle machine."""
    code = """if True:
        import sys
        import art_pixeldefend
        assert "numpy" not in sys.modules
        from art_pixeldefend import cli
        try:
            cli.app(["purify", "--help"])
        except SystemExit:
            print({"numpy", "torch", "art", "PIL", "numba", "sklearn", "matplotlib"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_purify_writes_the_purified_array_in_the_form_of_the_input(images, tmp_path, digits_model):
    succeeds("purify", images, tmp_path / "out.npy", "--model", "digits", "--eps", 24, "--quiet")
    expected = greedy_decode(digits_model, np.load(images)[:, None], 24)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected[:, 0])


def test_purify_refuses_an_output_before_the_work_is_done(images, tmp_path, monkeypatch):
    monkeypatch.setattr("art_pixeldefend.PixelDefend.__call__", lambda *_, **__: pytest.fail("too late"))
    for name in ("out.txt", "in.npy/out.npy"):
        assert name in fails("purify", images, tmp_path / name, "--model", "digits", "--quiet")
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


@pytest.mark.parametrize(
    ("command", "option"),
    [("score", "--out"), ("detect", "--out"), ("detect", "--likelihoods"), ("sample", "--out")],
)
def test_files_that_cannot_be_written_are_refused_before_the_work_is_done(
    command, option, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("art_pixeldefend.models.zoo.load", lambda *_, **__: pytest.fail("too late"))
    options = {"--out": tmp_path / "x.csv"} if command == "detect" else {}
    options = {"--model": "digits"} | options | {option: images / "x.npy"}
    source = [] if command == "sample" else [images]
    assert "in.npy/x.npy" in fails(command, *source, *(word for pair in options.items() for word in pair))
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


def test_help_names_every_kind_of_model():
    assert ", ".join(KINDS) == cli.KINDS


SMALL = ["--filters", 4, "--resnets", 1, "--set", "mixtures=2", "--steps", 2, "--batch-size", 4, "--quiet"]


def test_train_says_what_it_holds_back_and_records_no_place(digits, tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    for i, image in enumerate(digits.x_train[:40]):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    run_folder = folder / "run"  # inside the images' folder
    said = succeeds("train", folder, "--out", run_folder, *SMALL)
    assert re.fullmatch(
        r"\d\.\d{4} bits/dim on all test images; held back from training: 3 calibration and 4 test images\n", said
    )
    assert (run_folder / "samples.png").exists()
    assert b"secret" not in (run_folder / "model.safetensors").read_bytes()
    more = [*SMALL, "--steps", 3]
    succeeds("train", f"{folder}/./", "--out", run_folder, *more, "--resume")
    for i in range(20):
        (folder / f"{i}.png").unlink()
    said = fails("train", folder, "--out", run_folder, *more, "--resume")
    assert "training_images was 33, now it is" in said and "--start-from" in said


def test_train_does_not_overwrite_a_run_unless_told_to(tmp_path):
    arguments = ["train", "digits", "--out", tmp_path, *SMALL]
    succeeds(*arguments)
    before = (tmp_path / "model.safetensors").read_bytes()
    said = fails(*arguments, "--seed", 1)
    assert "--resume" in said and "--overwrite" in said
    assert (tmp_path / "model.safetensors").read_bytes() == before
    succeeds(*arguments, "--seed", 1, "--overwrite")
    assert (tmp_path / "model.safetensors").read_bytes() != before
    assert "seed was 1, now it is 0" in fails(*arguments, "--resume")


def test_train_takes_the_size_of_the_model_it_starts_from(tmp_path, digits):
    succeeds("train", "digits", "--out", tmp_path / "first", *SMALL)
    checkpoint = tmp_path / "first" / "checkpoint.safetensors"
    options = ["--start-from", checkpoint, "--steps", 1, "--quiet", "--dropout", 0.1, "--learning-rate", 0]
    succeeds("train", "digits", "--out", tmp_path / "second", *options)
    first, second = (load(tmp_path / name / "model.safetensors", "cpu") for name in ("first", "second"))
    assert second.configuration == first.configuration | {"dropout": 0.1}
    assert torch.equal(first.log_prob(digits.x_test[:5]), second.log_prob(digits.x_test[:5]))


def test_train_takes_any_argument_of_a_model_of_any_kind(tmp_path):
    score = [
        "train",
        "digits",
        "--kind",
        "score",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--batch-size",
        2,
        "--quiet",
    ]
    sizes = ["--set", "channels=[4]", "--set", "blocks=[1]", "--set", "embedding=4"]
    succeeds(*score, *sizes)
    assert load(tmp_path / "run" / "model.safetensors", "cpu").channels == (4,)
    assert "--filters is not an option of score models" in fails(*score, "--filters", 3, "--overwrite")
    assert "--set must be NAME=VALUE" in fails(*score, "--set", "channels", "--overwrite")
    assert "--kind must be one of" in fails("train", "digits", "--kind", "gan", "--out", tmp_path / "x")
    assert ", ".join(KINDS) == cli.KINDS


@pytest.mark.parametrize("command", ["score", "detect"])
def test_a_folder_is_refused_as_a_table_before_the_work_is_done(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr("art_pixeldefend.models.zoo.load", lambda *_, **__: pytest.fail("too late"))
    assert "--out" in fails(command, images, "--model", "digits", "--out", tmp_path, "--quiet")


def test_score_prints_the_mean_and_writes_each_image(images, tmp_path, digits_model):
    output = succeeds("score", images, "--model", "digits", "--out", tmp_path / "bits.csv", "--quiet")
    bits = digits_model.bits_per_dim(np.load(images)[:, None]).numpy()
    assert f"{bits.mean():.4f} bits/dim" in output
    rows = list(csv.DictReader((tmp_path / "bits.csv").open()))
    np.testing.assert_allclose([float(row["bits_per_dim"]) for row in rows], bits, rtol=1e-6)


def test_the_score_of_no_images_is_refused(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8), np.uint8))
    assert "none.npy" in fails("score", tmp_path / "none.npy", "--model", "digits", "--quiet")


def test_arrays_of_the_models_own_number_of_channels_go_from_command_to_command(tmp_path, make_model):
    make_model((2, 6, 5)).save(tmp_path / "model.safetensors")
    model = ["--model", tmp_path / "model.safetensors"]
    succeeds("sample", *model, "--out", tmp_path / "x.npy", "--count", 3)
    succeeds("score", tmp_path / "x.npy", *model, "--quiet")
    succeeds("purify", tmp_path / "x.npy", tmp_path / "y.npy", *model, "--quiet")
    assert np.load(tmp_path / "x.npy").shape == np.load(tmp_path / "y.npy").shape == (3, 2, 6, 5)
    assert "x.npy" in fails("score", tmp_path / "x.npy", "--model", "digits", "--quiet")
    assert "--out" in fails("sample", *model, "--out", tmp_path / "x.png")


def test_images_of_another_shape_than_the_models_are_refused(images, tmp_path, make_model):
    for shape, found in (((1, 8, 9), "1 x 8 x 8"), ((3, 8, 8), "in.npy")):
        make_model(shape).save(tmp_path / "model.safetensors")
        for command in (["score", images], ["purify", images, tmp_path / "out.npy"]):
            error = fails(*command, "--model", tmp_path / "model.safetensors", "--quiet")
            assert "in.npy" in error and found in error


@pytest.mark.parametrize("mode", ["L", "LA", "RGB"])
def test_a_folder_of_grey_images_in_any_mode_is_purified_by_a_grey_model(mode, tmp_path, digits, digits_model):
    for i, image in enumerate(digits.x_test[:3, 0]):
        (tmp_path / "in" / f"{i}").mkdir(parents=True)
        Image.fromarray(image).convert(mode).save(tmp_path / "in" / f"{i}" / "image.png")
    succeeds("purify", tmp_path / "in", tmp_path / "out", "--model", "digits", "--quiet")
    expected = greedy_decode(digits_model, digits.x_test[:3], 16)
    for i, image in enumerate(expected[:, 0]):
        np.testing.assert_array_equal(Image.open(tmp_path / "out" / f"{i}" / "image.png"), image)


@pytest.mark.parametrize(
    ("command", "target", "file"),
    [
        (["purify", "in.npy", "x.npy"], "x.npy", "x.npy"),
        (["purify", "folder", "pictures"], "pictures", "pictures/a.png"),
        (["score", "in.npy", "--out", "x.csv"], "x.csv", "x.csv"),
        (["detect", "in.npy", "--out", "x.csv", "--training", "in.npz"], "x.csv", "x.csv"),
        (["sample", "--out", "x.npz"], "x.npz", "x.npz"),
        (["sample", "--out", "x.png"], "x.png", "x.png"),
        (["demo", "--out", "pictures"], "pictures", "pictures/a.png"),
    ],
)
def test_existing_results_are_replaced_only_if_told_to(command, target, file, images, training, tmp_path, monkeypatch):
    """And refused before any work is done."""
    for folder in ("pictures", "folder"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("art_pixeldefend.evaluation.demo.run", lambda out, **_: (out / "a.png").write_text("new"))
    (tmp_path / file).write_text("old")
    command += [] if command[0] == "demo" else ["--model", "digits"]
    with monkeypatch.context() as patch:
        for method in ("PixelCNNpp.sample", "PixelDefend.__call__", "PixelDefendDetector.score"):
            patch.setattr(f"art_pixeldefend.{method}", lambda *_, **__: pytest.fail("too late"))
        error = fails(*command)
    assert target in error and "--overwrite" in error and (tmp_path / file).read_text() == "old"
    succeeds(*command, "--overwrite")
    assert (tmp_path / file).read_bytes() != b"old"


def test_a_table_is_appended_to_the_standard_output(images, tmp_path):
    expected = succeeds("score", images, "--model", "digits", "--out", tmp_path / "x.csv", "--quiet")
    (tmp_path / "all.csv").write_text("kept\n")
    with (tmp_path / "all.csv").open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "art_pixeldefend", "score", images, "--model", "digits", "--out", "/dev/stdout"],
            stdout=file, stderr=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert (tmp_path / "all.csv").read_text() == "kept\n" + (tmp_path / "x.csv").read_text()
    assert done.stderr.endswith(expected)


def test_a_device_is_an_option_wherever_a_model_runs(images, training, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device=None, **_: used.append(str(device)) or self)
    commands = {
        "purify": [images, tmp_path / "x.npy"], "score": [images], "sample": ["--out", tmp_path / "x.png"],
        "detect": [images, "--out", tmp_path / "x.csv", "--training", training],
    }  # fmt: skip
    for command, arguments in commands.items():
        succeeds(command, *arguments, "--model", "digits", "--device", "cpu:0")
        assert used[-1] == "cpu:0"
        assert "--device must be" in fails(command, *arguments, "--model", "digits", "--device", "none", "--overwrite")


def test_two_processes_share_the_images_and_give_the_same(images, tmp_path):
    """Also where there are fewer images than processes, and command after command."""
    few = tmp_path / "few.npy"
    np.save(few, np.load(images)[:1])
    purify = ["purify", few, tmp_path / "alone.npy", "--model", "digits", "--quiet"]
    score = ["score", images, "--model", "digits", "--out", tmp_path / "alone.csv"]
    succeeds(*purify)
    alone = succeeds(*score, "--quiet")
    (tmp_path / "script.py").write_text("""if True:
        import sys
        from art_pixeldefend.cli import app
        for arguments in sys.argv[1:]:
            try:
                app(arguments.replace("alone", "together").split(","))
            except SystemExit as end:
                assert not end.code""")
    together = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
        + [",".join(map(str, command)) for command in (purify, score)],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr[-2000:]
    assert together.stdout.endswith(alone) and "2 processes" in together.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "alone.npy"), np.load(tmp_path / "together.npy"))
    one, other = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines())) for name in ("alone", "together")
    )
    assert [row["image"] for row in one] == [row["image"] for row in other]
    bits = ([float(row["bits_per_dim"]) for row in rows] for rows in (one, other))
    np.testing.assert_allclose(*bits, atol=1e-5)


def test_detect_scores_the_training_images_once(images, training, tmp_path, monkeypatch):
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--likelihoods", tmp_path / "l.st"]
    succeeds(*arguments, "--training", training, "--quiet")
    first = (tmp_path / "p.csv").read_text()
    monkeypatch.setattr(datasets, "load", lambda *_: pytest.fail("the kept likelihoods should do"))
    arguments += ["--quiet", "--overwrite"]
    succeeds(*arguments)
    assert (tmp_path / "p.csv").read_text() == first
    rows = list(csv.DictReader(first.splitlines()))
    assert len(rows) == 12 and all(0 < float(row["p_value"]) <= 1 for row in rows)
    assert all((float(row["p_value"]) <= 0.05) == (row["adversarial"] == "1") for row in rows)
    alpha = float(np.median([float(row["p_value"]) for row in rows]))
    assert f"level {alpha:g}" in succeeds(*arguments, "--alpha", alpha)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert 6 <= sum(row["adversarial"] == "1" for row in rows) < 12
    assert all((float(row["p_value"]) <= alpha) == (row["adversarial"] == "1") for row in rows)


def test_kept_likelihoods_are_used_from_where_nothing_may_be_written(images, training, tmp_path, monkeypatch):
    kept = tmp_path / "kept" / "l.st"
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--likelihoods", kept, "--quiet"]
    succeeds(*arguments, "--training", training)
    monkeypatch.setattr("os.access", lambda folder, mode: folder != kept.parent)
    succeeds(*arguments, "--overwrite")
    kept.unlink()
    assert "l.st" in fails(*arguments, "--training", training, "--overwrite")


def test_detect_says_that_kept_likelihoods_go_before_training_images(images, training, tmp_path):
    kept = tmp_path / "l.st"
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--likelihoods", kept, "--quiet"]
    assert run(*arguments, "--training", training).stderr == ""
    arguments.append("--overwrite")
    assert run(*arguments).stderr == ""
    said = run(*arguments, "--training", "fashion-mnist").stderr
    assert said.count("\n") == 1 and "--training fashion-mnist" in said and str(kept) in said


def test_detect_compares_with_images_that_the_model_has_not_seen(digits, digits_model, tmp_path):
    arguments = ["detect", "digits", "--model", "digits", "--out", tmp_path / "p.csv", "--quiet", "--overwrite"]
    assert "200 calibration images" in succeeds(*arguments, "--calibration", "digits")
    found = [float(row["p_value"]) for row in csv.DictReader((tmp_path / "p.csv").open())]
    detector = PixelDefendDetector(digits_model, (0, 255))
    detector.fit(digits.calibration(digits_model).x)
    np.testing.assert_allclose(found, detector.detect(digits.test(digits_model).x)[0]["p_values"])
    np.save(tmp_path / "clean.npy", digits.x_test[200:230])  # other images are used as they are
    assert "30 calibration images" in succeeds(*arguments, "--calibration", tmp_path / "clean.npy")


def test_detect_takes_the_held_out_images_of_the_folder_that_the_model_was_trained_on(digits, tmp_path):
    folder, model = tmp_path / "photos", tmp_path / "run" / "model.safetensors"
    folder.mkdir()
    for i, image in enumerate(digits.x_train[:240]):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    size = ["--filters", 4, "--resnets", 1, "--steps", 1, "--batch-size", 4, "--device", "cpu"]
    succeeds("train", folder, "--out", model.parent, *size, "--quiet")
    arguments = ["detect", folder, "--out", tmp_path / "p.csv", "--calibration", folder, "--quiet", "--overwrite"]
    assert "compared with 21 calibration images" in succeeds(*arguments, "--model", model)
    assert "compared with 240 calibration images" in succeeds(*arguments, "--model", "digits")
    error = fails(*arguments, "--model", model, "--alpha", "0.04")
    assert "--calibration must hold at least 24 images for calibration at alpha 0.04" in error
    assert f"of the 240 images of '{folder}' only 21 are for it" in error


def test_detect_refuses_images_too_few_to_flag_any_and_likelihoods_of_other_images(images, tmp_path):
    arguments = ["detect", images, "--model", "digits", "--out", tmp_path / "p.csv", "--quiet"]
    error = fails(*arguments, "--calibration", images)
    assert "--calibration" in error and "at least 19 images" in error
    assert not (tmp_path / "p.csv").exists()
    arguments += ["--likelihoods", tmp_path / "l.st", "--overwrite"]
    succeeds(*arguments, "--training", "digits")
    assert "training images" in fails(*arguments, "--calibration", "digits")


@pytest.mark.parametrize("name", ["sheet.png", "x.npz"])
def test_sample_writes_a_sheet_or_an_array(name, tmp_path):
    succeeds("sample", "--model", "digits", "--out", tmp_path / name, "--count", 3)
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["purify", "nowhere", "out", "--model", "digits"], "nowhere"),
        (["score", "nowhere.npy", "--model", "digits"], "nowhere.npy"),
        (["score", "batch_size=True.npy", "--model", "digits"], "'batch_size=True.npy'"),
        (["score", "digits", "--model", "imagenet"], "--model must be"),
        (["score", "digits", "--model", "digits", "--batch-size", "0"], "--batch-size must be"),
        (["sample", "--model", "nowhere.safetensors", "--out", "x.png"], "--model must be"),
        (["sample", "--model", "digits", "--out", "x.gif"], "--out"),
        (["sample", "--model", "digits", "--out", "x.png", "--seed", "x"], "--seed"),
        (["sample", "--model", "digits"], "--out"),
        (["sample", "--nonsense"], "--nonsense"),
        (["train", "digits", "--out", "run", "--start-from", "imagenet"], "--start-from must be"),
        (["train", "digits", "--out", "run", "--device", "nonsense"], "--device must be"),
        (["train", "digits", "--out", "run", "--resume", "--overwrite"], "--resume and --overwrite"),
        (["train", "nowhere", "--out", "run"], "DATA must be"),
        (["train", "digits", "--out", "run", "--steps", "0"], "--steps must be"),
        (["train", "digits", "--out", "run", "--learning-rate", "-1"], "--learning-rate must be"),
        (["train", "fashion-mnist", "--out", "run", "--data-dir", "/dev/null/x"], "--data-dir"),
        (["detect", "digits", "--model", "digits", "--out", "x.csv"], "--calibration"),
        (["detect", "digits", "--model", "digits", "--out", "x.csv", "--training", "nowhere"], "--training must be"),
        (
            ["detect", "digits", "--model", "digits", "--out", "x.csv", "--training", "digits", "--alpha", "2"],
            "--alpha must be",
        ),
        (["grid", "imagenet", "--out", "table"], "digits"),
        (["grid", "digits", "--out", "table", "--model", "imagenet"], "--model must be"),
        (["grid", "digits", "--out", "table", "--starts", "-1"], "--starts must be"),
        (["nonsense"], "nonsense"),
    ],
)
def test_errors_are_one_line_that_names_what_was_typed(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(*arguments)
    assert not list(tmp_path.iterdir())


def test_the_installed_program_and_the_module_end_with_the_same_error():
    for program in (["art-pixeldefend"], [sys.executable, "-m", "art_pixeldefend"]):
        done = subprocess.run([*program, "sample", "--model", "x", "--out", "x.gif"], capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr == "error: --out must end in .png, .npy or .npz, got 'x.gif'\n"


def test_a_dry_run_of_a_grid_is_a_summary_and_verbose_a_list_of_all_cells(tmp_path):
    arguments = ["grid", "digits", "--out", tmp_path / "table", "--rows", "resnet/normal", "--dry-run"]
    summary, every = succeeds(*arguments), succeeds(*arguments, "--verbose")
    assert len(summary.splitlines()) < 10 and "0 stored" in summary
    cells = every.count("to do: ")
    assert cells > 20 and f"{cells} to compute" in summary and "to do: " not in summary
    assert succeeds(*arguments, "--quiet") == summary
    assert not list(tmp_path.iterdir())


# Detection with several scores


def rows_of(path):
    return list(csv.DictReader(path.open()))


SCORES = ["--score", "complexity", "--score", "score-norm:0.1"]
MODELS = ["--model", "digits", "--model", "digits-score"]


def test_several_scores_of_several_models_are_combined(digits, tmp_path):
    x = np.concatenate([digits.x_test[:10], np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), np.uint8)])
    np.save(tmp_path / "x.npy", x)
    arguments = ["detect", tmp_path / "x.npy", *MODELS, *SCORES, "--out", tmp_path / "p.csv", "--batch-size", 4]
    assert "200 calibration images" in succeeds(*arguments, "--calibration", "digits", "--quiet")
    detector = art_pixeldefend.detectors.ConformalDetector(
        [
            art_pixeldefend.detectors.ComplexityCorrectedLikelihood("digits"),
            art_pixeldefend.detectors.ScoreNorm("digits-score", 0.1),
        ],
        clip_values=(0, 255),
    )
    detector.fit(digits.x_test[200:])
    report, flagged = detector.detect(x)
    found = rows_of(tmp_path / "p.csv")
    assert list(found[0]) == ["image", "p_value", "complexity", "score-norm:0.1", "p_value of complexity",
                              "p_value of score-norm:0.1", "adversarial"]  # fmt: skip
    np.testing.assert_allclose([float(row["p_value"]) for row in found], report["p_values"])
    np.testing.assert_allclose([float(row["complexity"]) for row in found], report["scores"][:, 0], rtol=1e-5)
    assert [row["adversarial"] for row in found] == [str(int(flag)) for flag in flagged] and flagged[10:].all()


def test_the_false_discovery_rate_replaces_the_level(digits, tmp_path):
    x = np.concatenate([digits.x_test[:60], np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), np.uint8)])
    np.save(tmp_path / "x.npy", x)
    kept = ["--likelihoods", tmp_path / "c.st", "--out", tmp_path / "p.csv", "--quiet", "--overwrite"]
    succeeds("calibrate", "digits", "--model", "digits", "--out", tmp_path / "c.st", "--quiet")
    output = succeeds("detect", tmp_path / "x.npy", "--model", "digits", *kept, "--fdr", 0.2)
    detector = PixelDefendDetector("digits", (0, 255))
    detector.fit(digits.x_test[200:])
    report, flagged = detector.detect_batch(x, q=0.2)
    found = rows_of(tmp_path / "p.csv")
    assert [row["adversarial"] for row in found] == [str(int(flag)) for flag in flagged]
    np.testing.assert_allclose([float(row["q_value"]) for row in found], report["q_values"])
    assert flagged[60:].all() and f"{flagged.sum()} of 80" in output and "false discovery rate of 0.2" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODELS, "--score", "entropy"], "--score must be one of"),
        (["--model", "digits", "--score", "score-norm"], "--score score-norm needs a model of kind score"),
        ([*MODELS, "--score", "score-norm:high"], "--score 'score-norm:high' is not as described"),
        ([*MODELS, "--score", "likelihood", "--score", "likelihood"], "--score must not be given twice"),
        (MODELS, "--model must be a single density model"),
        (["--model", "nowhere", "--score", "likelihood"], "--model must be a bundled model"),
        ([*MODELS, *SCORES, "--training", "digits"], "--training must not be given with --score"),
        (["--model", "digits", "--fdr", "0"], "--fdr must be above 0"),
        (["--model", "digits", "--fdr", "2"], "--fdr must be"),
    ],
)
def test_impossible_detectors_are_refused(arguments, message, images, tmp_path):
    given = [] if "--training" in arguments else ["--calibration", "digits"]
    assert message in fails("detect", images, "--out", tmp_path / "p.csv", *given, *arguments, "--quiet")


def test_calibrate_reports_on_one_page_and_writes_what_detect_reads(images, digits, tmp_path):
    page = tmp_path / "report.html"
    command = ["calibrate", "digits", *MODELS, *SCORES, "--out", tmp_path / "c.st", "--quiet", "--combine", "joint"]
    output = succeeds(*command, "--report", page)
    assert re.search(r"calibrated on 200 images; [\d.]+% of clean images flagged at level 0\.05", output)
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text  # nothing is loaded
    assert text.count("<figcaption>Histogram of the scores; QQ plot") == 2 and text.count("<img") == 2 * 2 + 32
    assert "--overwrite" in fails(*command) and "--overwrite" in fails(*command, "--report", page)
    detect = ["detect", images, *MODELS, *SCORES, "--combine", "joint", "--likelihoods", tmp_path / "c.st"]
    assert "200 calibration images" in succeeds(*detect, "--out", tmp_path / "p.csv", "--quiet")
    few = tmp_path / "few.npy"
    np.save(few, digits.x_test[:19])
    output = succeeds("calibrate", few, "--model", "digits", "--out", tmp_path / "few.st", "--report", page,
                      "--overwrite", "--quiet")  # fmt: skip
    assert "too few images to measure" in output and "too few for 0.01, 0.05." in page.read_text()
    assert "at least 19 images" in fails("calibrate", images, "--model", "digits", "--out", tmp_path / "x", "--quiet")


@pytest.fixture
def torchscript(tmp_path):
    """A linear classifier of digits as a TorchScript file."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.jit.script(model).save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_torchscript_classifier_behind_a_defence_is_evaluated(torchscript, tmp_path):
    defence = ("--defence", "ScoreDenoiser", "--set", "model=digits-score", "--set", "sigma=0.1")
    shown = succeeds(
        "evaluate", "digits", "--classifier", torchscript, *defence, "--images", 4, "--out", tmp_path / "r.json"
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert [attack["name"] for attack in found["attacks"]] == ["clean", "blind", "transfer", "BPDA", "exact", "Square"]
    assert "worst case" in shown and "8/255 (Linf)" in shown and "ScoreDenoiser" in shown
    assert "exists" in fails("evaluate", "digits", "--classifier", torchscript, "--out", tmp_path / "r.json")
    again = succeeds(
        "evaluate", "digits", "--classifier", torchscript, "--images", 4, "--baseline", tmp_path / "r.json"
    )
    assert "without a defence is as robust" in again and "no baseline" not in again


def test_surrogates_are_trained_on_test_images_that_are_not_evaluated_if_there_are_no_others(torchscript, monkeypatch):
    seen = []

    def evaluated(model, purifier, x, y, *, surrogate_images, **_):
        seen.append((x, surrogate_images))
        return "evaluated"

    monkeypatch.setattr("art_pixeldefend.evaluation.evaluate_robustness", evaluated)
    arguments = ("evaluate", "fashion-mnist-500", "--classifier", torchscript, "--budget", "standard")
    assert "surrogate" not in run(*arguments, "--images", 300).output
    assert "no attack uses a surrogate" in run(*arguments, "--images", 500).stderr
    assert [None if images is None else len(images) for _, images in seen] == [200, None]
    images = from_levels(datasets.load("fashion-mnist-500").x_test, UNIT)
    assert np.array_equal(np.concatenate(seen[0]), images)


def test_a_radius_of_l2_has_no_default(torchscript):
    arguments = ("evaluate", "digits", "--classifier", torchscript, "--images", 2, "--norm", "L2")
    assert "--eps" in fails(*arguments)
    assert "0.5 (L2)" in succeeds(*arguments, "--eps", 0.5)


def test_a_state_dict_and_an_import_path_are_evaluated(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.zero_(), model[1].bias.copy_(torch.arange(10.0))  # always nine
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    arguments = ("--classifier", "mine:net", "--weights", tmp_path / "w.safetensors", "--images", 30)
    shown = succeeds("evaluate", "digits", *arguments)
    nines = 100 * (datasets.load("digits").y_test[:30] == 9).mean()
    assert f"| clean |  | {nines:.1f} |" in shown


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--classifier", "nothing"), "neither a file nor one of cifar-10-resnet"),
        (("--classifier", "no.module:f"), "no.module"),
        (("--classifier", "torch.nn:Identity", "--defence", "Nothing"), "'Nothing' cannot be imported"),
        (("--classifier", "torch.nn:Identity", "--budget", "huge"), "--budget must be one of"),
        (("--classifier", "torch.nn:Identity", "--defence", "PixelDefend", "--set", "eps"), "--set must be NAME=VALUE"),
        (("--classifier", "torch.nn:Flatten", "--norm", "L7"), "--norm must be"),
        (("--classifier", "torch.nn:Flatten", "--images", "0"), "--images must be"),
        (("--classifier", "torch.nn:Flatten", "--eps", "0.03"), "for 8/255 pass 8"),
    ],
)
def test_wrong_arguments_of_an_evaluation_are_named(arguments, error):
    assert error in fails("evaluate", "digits", *arguments)
