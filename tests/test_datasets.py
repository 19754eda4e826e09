import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from art_pixeldefend import cli, datasets
from art_pixeldefend.datasets import Split
from art_pixeldefend.detectors.conformal import least_calibration_images
from art_pixeldefend.models import zoo
from art_pixeldefend.validation import check_labels


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes())


def test_digits_are_there_without_a_download(digits):
    assert digits.image_shape == (1, 8, 8) and digits.x_train.dtype == np.uint8
    assert [len(x) for x in (digits.x_train, digits.x_calibration, digits.x_test)] == [1258, 139, 400]
    assert set(digits.y_train) == set(digits.y_calibration) == set(digits.y_test) == set(range(10))
    assert digits.x_train.max() == 255


def test_fashion_mnist_is_whole(fashion_mnist):
    official = fashion_mnist.train_and_calibration()
    assert official.x.shape == (60_000, 1, 28, 28) and fashion_mnist.x_test.shape == (10_000, 1, 28, 28)
    assert official.x.mean() / 255 == pytest.approx(0.28604, abs=1e-5)
    assert len(fashion_mnist.x_calibration) == 6_000 and len(fashion_mnist.reserve().x) == 2_000
    assert np.bincount(fashion_mnist.y_test).tolist() == [1000] * 10


def test_the_sample_holds_the_first_test_images_of_fashion_mnist(fashion_mnist):
    sample = datasets.load("fashion-mnist-500")
    np.testing.assert_array_equal(sample.x_test, fashion_mnist.x_test[:500])
    np.testing.assert_array_equal(sample.y_test, fashion_mnist.y_test[:500])
    assert sample.classes == fashion_mnist.classes


def test_the_sample_is_there_without_a_download_and_small(tmp_path):
    sample = datasets.load("fashion-mnist-500", tmp_path, download=False)
    model = SimpleNamespace(provenance={})
    assert len(sample.test(model).x) == 300 and len(sample.calibration(model).x) == 200 and not len(sample.x_train)
    folder = Path(datasets.__file__).parent / "samples"
    assert (folder / "fashion-mnist-500.npz").stat().st_size < 300_000
    assert "Zalando" in (folder / "fashion-mnist-500.md").read_text()


def test_cifar_10_is_whole(cifar_10):
    official = cifar_10.train_and_calibration()
    assert official.x.shape == (50_000, 3, 32, 32) and cifar_10.x_test.shape == (10_000, 3, 32, 32)
    np.testing.assert_allclose(official.x.mean((0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert np.bincount(cifar_10.y_test).tolist() == [1000] * 10
    assert len(cifar_10.x_calibration) == 5_000 and cifar_10.held_out_from(zoo.load("cifar-10-score"))


# Splits


def tagged(count, size=4):
    """Distinct images with their numbers as labels."""
    x = np.random.default_rng(0).integers(0, 256, (count, 1, size, size), dtype=np.uint8)
    return Split(x, np.arange(count))


def stored(folder, **arrays):
    np.savez(folder / "mine.npz", **arrays)
    return datasets.load(folder / "mine.npz")


@given(count=st.integers(0, 60), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_calibration_images_have_the_smallest_hashes_whatever_the_order(count, seed):
    x, y = tagged(count)
    order = np.random.default_rng(seed).permutation(count)
    hashes = {i: hashlib.sha256(x[i].tobytes()).hexdigest() for i in range(count)}
    expected = sorted(hashes, key=hashes.__getitem__)[: count // 10]
    data = datasets._dataset("mine", Split(x[order], y[order]), tagged(5), ("image",))
    assert sorted(data.y_calibration) == sorted(expected)
    assert sorted([*data.y_train, *data.y_calibration]) == list(range(count))
    for images, labels in ((data.x_train, data.y_train), (data.x_calibration, data.y_calibration)):
        np.testing.assert_array_equal(images, x[labels])


def test_train_and_calibration_images_together_are_in_the_order_of_the_source(tmp_path):
    x, y = tagged(40)
    together = stored(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y).train_and_calibration()
    np.testing.assert_array_equal(together.x, x)
    np.testing.assert_array_equal(together.y, y)


def test_calibration_images_of_an_npz_are_taken_as_they_are(tmp_path):
    (x, y), (other, _) = tagged(40), tagged(7)
    data = stored(tmp_path, x_train=x, y_train=y, x_calibration=other, x_test=x)
    np.testing.assert_array_equal(data.x_calibration, other)
    np.testing.assert_array_equal(data.x_train, x)
    np.testing.assert_array_equal(data.train_and_calibration().x, np.concatenate([x, other]))
    assert not data.y_calibration.any()


@pytest.mark.parametrize("model", [None, SimpleNamespace(provenance={}), SimpleNamespace(provenance=None), "digits"])
def test_a_model_of_unknown_training_is_calibrated_on_the_end_of_the_test_images(model, digits):
    calibration, test = digits.calibration(model), digits.test(model)
    np.testing.assert_array_equal(np.concatenate([test.x, calibration.x]), digits.x_test)
    np.testing.assert_array_equal(np.concatenate([test.y, calibration.y]), digits.y_test)
    assert len(calibration.x) == digits.reserved == 200


def test_a_model_trained_without_the_calibration_images_is_calibrated_on_them(digits):
    model = SimpleNamespace(provenance={datasets.FINGERPRINT: datasets.fingerprint(digits.x_train)})
    np.testing.assert_array_equal(digits.calibration(model).x, digits.x_calibration)
    np.testing.assert_array_equal(digits.test(model).x, digits.x_test)
    left_out, seen = model.provenance, {datasets.FINGERPRINT: datasets.fingerprint(digits.train_and_calibration().x)}
    for provenance, held_out in (
        (seen, False),
        (left_out | {"start": left_out}, True),
        (left_out | {"start": seen}, False),
        (left_out | {"start": {}}, False),
    ):
        model.provenance = provenance
        assert digits.held_out_from(model) == held_out
        expected = digits.x_calibration if held_out else digits.reserve().x
        np.testing.assert_array_equal(digits.calibration(model).x, expected)


def test_the_order_of_the_training_images_does_not_matter(digits):
    x = digits.x_train
    entries = {"training_images": len(x), datasets.SAMPLE: datasets.sample(x)}
    model = SimpleNamespace(provenance={datasets.FINGERPRINT: datasets.fingerprint(x[::-1]), **entries})
    assert digits.held_out_from(model) and datasets.training_images_in(x, model) == len(x)
    for other in (
        entries | {"training_images": len(x) + 1},
        entries | {datasets.SAMPLE: datasets.sample(digits.train_and_calibration().x)},
        entries | {datasets.SAMPLE: []},
        {"training_images": len(x)},
        entries | {"start": {}},
    ):
        model.provenance = other
        assert not digits.held_out_from(model)


@pytest.mark.parametrize("name", zoo.names())
def test_bundled_models_are_calibrated_on_images_that_they_have_not_seen(name, load_official_data):
    data = datasets.load("digits") if name.startswith("digits") else load_official_data("-".join(name.split("-")[:2]))
    model = zoo.load(name)
    seen = data.x_train if data.held_out_from(model) else data.train_and_calibration().x
    # The last run of cifar-10 had nine tenths of the train split.
    assert model.provenance["training_images"] == (40_500 if name == "cifar-10" else len(seen))
    seen, calibration, test = (
        {image.tobytes() for image in x} for x in (seen, data.calibration(model).x, data.test(model).x)
    )
    assert len(calibration) >= 139 and not calibration & seen and not calibration & test


def test_a_model_trained_by_the_command_line_is_calibrated_on_the_calibration_split(tmp_path):
    data = stored(tmp_path, x_train=tagged(40).x, y_train=np.eye(40), x_test=tagged(10).x)
    options = {"out": tmp_path / "run", "filters": 4, "resnets": 1, "steps": 1, "batch-size": 4, "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert CliRunner().invoke(cli.app, ["train", data.name, *words, "--quiet"]).exit_code == 0
    model = zoo.load(tmp_path / "run" / "model.safetensors")
    assert data.held_out_from(model) and np.array_equal(data.calibration(model).x, data.x_calibration)


def test_fingerprints_tell_images_shapes_and_orders_apart():
    x = np.arange(24, dtype=np.uint8).reshape(2, 1, 3, 4)
    different = (x, x[::-1], x + 1, x.reshape(2, 1, 4, 3), x[:1])
    assert len({datasets.fingerprint(some) for some in different}) == len(different)
    assert datasets.fingerprint(np.asfortranarray(x)) == datasets.fingerprint(x.copy())


def test_training_images_are_found_among_others(digits):
    x, other = digits.x_train, digits.x_test
    trained = SimpleNamespace(provenance={datasets.SAMPLE: datasets.sample(x)})
    tuned = SimpleNamespace(provenance={"start": trained.provenance})
    for model in (trained, tuned):
        assert datasets.training_images_in(x, model) == datasets.SAMPLED
        assert datasets.training_images_in(other, model) == 0 == datasets.training_images_in(x[:0], model)
        found = datasets.training_images_in(np.concatenate([other, x[::2][::-1]]), model)
        assert 90 < found < 166  # half of those in the sample
    whole = SimpleNamespace(provenance={datasets.FINGERPRINT: datasets.fingerprint(x)})
    assert datasets.training_images_in(x, whole) == len(x) and datasets.training_images_in(x[1:], whole) == 0
    assert datasets.training_images_in(x, SimpleNamespace()) == 0


@pytest.mark.parametrize(("name", "share"), [("digits", 4), ("fashion_mnist", 32)])
def test_training_images_of_bundled_models_are_found_by_a_known_share_of_them(name, share, request):
    data = request.getfixturevalue(name)
    for x in (data.x_train, data.train_and_calibration().x):
        model = SimpleNamespace(provenance={"dataset": data.name, "training_images": len(x)})
        assert datasets.training_images_in(x, model) == -(-len(x) // share)
        assert datasets.training_images_in(data.reserve().x, model) == 0
    model.provenance["training_images"] = 1000
    assert datasets.training_images_in(x, model) == 0


# Files


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar-10"])
def test_tests_that_need_missing_official_files_skip_and_name_them(name, load_official_data, tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.DATA_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=rf"{name}.*missing"):
        load_official_data(name)
    monkeypatch.delenv(datasets.DATA_DIR_VARIABLE)
    with pytest.raises(pytest.skip.Exception, match=name):
        load_official_data(name)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar-10"])
def test_missing_official_files_are_named_with_the_remedy(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir"):
        datasets.load(name, tmp_path, download=False)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_gives_the_remedy_first_and_leaves_no_new_folder(tmp_path, monkeypatch):
    def fail(url, known_hash, fname, path, **_):
        path.mkdir(parents=True)
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.pooch, "retrieve", fail)
    with pytest.raises(FileNotFoundError, match=r"is missing: put the official files there, .*: no route to host$"):
        datasets.load("fashion-mnist", tmp_path / "mistyped" / "folder")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match=r"^name must be one of .*, got '.*photos', which does not exist$"):
        datasets.load(tmp_path / "photos")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="digits, fashion-mnist, fashion-mnist-500, cifar-10"):
        datasets.load("imagenet")


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: b"no gzip", lambda d: gzip.compress(b"\0\0\x0b\1")]
)
def test_a_damaged_official_file_is_refused_by_name(damage, tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for file in datasets.FASHION_MNIST_MD5:
        shape = (4, 28, 28) if "images" in file else (4,)
        (folder / file).write_bytes(idx(np.zeros(shape, np.uint8)))
    with pytest.raises(ValueError, match="60000"):
        datasets.load("fashion-mnist", tmp_path, download=False)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="t10k-images"):
        datasets.load("fashion-mnist", tmp_path, download=False)


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """The data directory with an archive like the official one, of 20 images a file; and the labels of its images."""
    folder, labels = tmp_path / "data", np.arange(120) % 10
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (120, 3073), dtype=np.uint8)
    records[:, 0] = labels
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for i, name in enumerate((*datasets.CIFAR_10_FILES, "readme.html")):
            content = records[20 * i : 20 * (i + 1)].tobytes()
            member = tarfile.TarInfo(f"{datasets.CIFAR_10_FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(datasets, "CIFAR_10_IMAGES", 20)
    monkeypatch.setattr(datasets, "CIFAR_10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    return folder, labels


def cifar_labels(data):
    return np.concatenate([data.train_and_calibration().y, data.y_test])


def during_the_last_file(monkeypatch, action):
    """Call ``action`` when the sixth file is on its way to the disk."""
    calls, fsync = [], os.fsync

    def hook(descriptor):
        fsync(descriptor)
        calls.append(os.fstat(descriptor).st_size)
        if sum(size == 20 * 3073 for size in calls) == 6:
            monkeypatch.undo()
            action()

    monkeypatch.setattr(os, "fsync", hook)
    return calls


def test_an_archive_that_is_there_is_extracted_without_a_download(cifar_archive):
    folder, labels = cifar_archive
    np.testing.assert_array_equal(cifar_labels(datasets.load("cifar-10", folder, download=False)), labels)
    assert sorted(os.listdir(folder / datasets.CIFAR_10_FOLDER)) == sorted(datasets.CIFAR_10_FILES)


def test_an_extraction_killed_in_its_last_file_is_completed_by_the_next(cifar_archive, monkeypatch):
    folder, labels = cifar_archive

    def kill():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        written = during_the_last_file(patched, kill)
        with pytest.raises(KeyboardInterrupt):
            datasets.load("cifar-10", folder, download=False)
    assert len(written) >= 6 and not (folder / datasets.CIFAR_10_FOLDER / "test_batch.bin").exists()
    np.testing.assert_array_equal(cifar_labels(datasets.load("cifar-10", folder, download=False)), labels)


def test_another_process_may_extract_the_same_archive_meanwhile(cifar_archive, monkeypatch):
    folder, labels = cifar_archive
    other = []
    with monkeypatch.context() as patched:
        during_the_last_file(patched, lambda: other.append(datasets.load("cifar-10", folder, download=False)))
        mine = datasets.load("cifar-10", folder, download=False)
    for data in (*other, mine):
        np.testing.assert_array_equal(cifar_labels(data), labels)
    assert len(other) == 1


@pytest.mark.parametrize("name", ["fashion-mnist", datasets.CIFAR_10_FOLDER])
def test_the_data_directory_may_be_the_folder_of_the_files_themselves(name, tmp_path, monkeypatch):
    files = datasets.FASHION_MNIST_MD5 if name == "fashion-mnist" else datasets.CIFAR_10_FILES
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b"truncated")
    with pytest.raises(ValueError, match=rf"{folder}/(train-images|data_batch_1)"):
        datasets.load(name.removesuffix("-batches-bin"), folder, download=False)


def test_a_cifar_batch_cut_short_is_refused_by_name(tmp_path):
    folder = tmp_path / datasets.CIFAR_10_FOLDER
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / f"{name}.bin").write_bytes(b"\0" * 3073)
    with pytest.raises(ValueError, match="data_batch_1"):
        datasets.load("cifar-10", tmp_path, download=False)


@pytest.mark.parametrize("shape", [(20, 6, 5), (20, 6, 5, 3), (20, 3, 6, 5), (20, 6, 5, 1)])
def test_an_npz_of_any_usual_layout_becomes_nchw(shape, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    y = np.arange(20) % 4
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    loaded = datasets.load(tmp_path / "mine.npz")
    channels = 3 if 3 in shape else 1
    assert loaded.x_train.shape == (18, channels, 6, 5) and loaded.classes == ("0", "1", "2", "3")
    assert loaded.x_calibration.shape == (2, channels, 6, 5)
    assert loaded.x_test.shape == (3, channels, 6, 5)


@pytest.mark.parametrize(("count", "calibration"), [(211, 19), (210, 18)])
def test_the_readme_says_how_many_images_calibrate_the_default_detector(count, calibration, tmp_path):
    data = stored(tmp_path, x_train=tagged(count).x)
    assert len(data.x_calibration) == calibration
    assert least_calibration_images(0.05, lambda count: 1 / (count + 1)) == 19


def test_an_npz_without_test_images_is_split_without_overlap(tmp_path):
    x = np.arange(30, dtype=np.uint8).repeat(16).reshape(30, 4, 4)
    np.savez(tmp_path / "mine.npz", x_train=x)
    loaded = datasets.load(tmp_path / "mine.npz")
    assert len(loaded.x_test) == 3 and len(loaded.x_calibration) == 2
    together = np.concatenate([loaded.x_train, loaded.x_calibration, loaded.x_test])
    assert sorted(together[:, 0, 0, 0]) == list(range(30))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"x": np.zeros((2, 4, 4), np.uint8)},
        {"x_train": np.zeros((2, 4, 4))},
        {"x_train": np.zeros((2, 4), np.uint8)},
        {"x_train": np.uint8(3)},
        {"x_train": np.zeros((2, 4, 4, 2), np.uint8)},
        {"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.zeros(3, int)},
        {"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.zeros(2)},
        {"x_train": np.zeros((2, 4, 4), np.uint8), "x_test": np.zeros((2, 4, 5), np.uint8)},
        {"x_train": np.zeros((2, 4, 4), np.uint8), "x_calibration": np.zeros((2, 4, 5), np.uint8)},
        {"x_train": np.array([[None]])},
    ],
)
def test_an_npz_of_something_else_is_refused_by_name(arrays, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=r"mine\.npz|x_train|y_train|x_calibration|x_test"):
        datasets.load(tmp_path / "mine.npz")


def test_an_npz_cut_short_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=np.zeros((20, 4, 4), np.uint8))
    path = tmp_path / "mine.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"mine\.npz"):
        datasets.load(path)


# Labels


@pytest.mark.parametrize(
    "as_given",
    [
        lambda y: y,
        lambda y: y[:, None],
        lambda y: np.eye(4)[y],
        lambda y: np.eye(4, dtype=bool)[y],
        lambda y: y.tolist(),
        lambda y: torch.from_numpy(y),
        lambda y: torch.eye(4, requires_grad=True)[y],
    ],
)
def test_labels_may_be_class_numbers_columns_or_one_hot(as_given):
    y = np.array([3, 0, 2, 2, 1])
    labels = check_labels("y", as_given(y), 5)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, y)


@pytest.mark.parametrize(
    "y",
    [
        np.zeros(2), np.array([0, -1]), np.zeros((2, 2), int), np.array([[1, 1], [0, 1]]), np.full((2, 2), 0.5),
        np.zeros(3, int), np.array(["a", "b"]), [[0], [0, 1]], None, np.zeros((2, 1, 1), int), np.array([None, 1]),
    ],
)  # fmt: skip
def test_other_labels_are_refused_by_name(y):
    with pytest.raises(ValueError, match=r"^y_train must be 2 class numbers"):
        check_labels("y_train", y, 2)


@pytest.mark.parametrize("as_given", [lambda y: y[:, None], lambda y: np.eye(4, dtype=np.float32)[y]])
def test_an_npz_may_hold_labels_as_columns_or_one_hot(as_given, tmp_path):
    x, y = tagged(20)
    data = stored(tmp_path, x_train=x, y_train=as_given(y % 4), x_test=x, y_test=as_given(y % 4))
    np.testing.assert_array_equal(data.y_test, y % 4)
    assert data.classes == ("0", "1", "2", "3")
