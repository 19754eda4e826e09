import gzip

import numpy as np
import pytest

from art_pixeldefend import datasets


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes())


def test_digits_are_there_without_a_download(digits):
    assert digits.image_shape == (1, 8, 8) and digits.x_train.dtype == np.uint8
    assert len(digits.x_train) + len(digits.x_test) == 1797
    assert set(digits.y_train) == set(digits.y_test) == set(range(10))
    assert digits.x_train.max() == 255


def test_fashion_mnist_is_whole(fashion_mnist):
    assert fashion_mnist.x_train.shape == (60_000, 1, 28, 28) and fashion_mnist.x_test.shape == (10_000, 1, 28, 28)
    assert fashion_mnist.x_train.mean() / 255 == pytest.approx(0.28604, abs=1e-5)
    assert np.bincount(fashion_mnist.y_test).tolist() == [1000] * 10


def test_cifar_10_is_whole(cifar_10):
    assert cifar_10.x_train.shape == (50_000, 3, 32, 32) and cifar_10.x_test.shape == (10_000, 3, 32, 32)
    np.testing.assert_allclose(cifar_10.x_train.mean((0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert np.bincount(cifar_10.y_test).tolist() == [1000] * 10


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


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="digits, fashion-mnist, cifar-10"):
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
    assert loaded.x_train.shape == (20, channels, 6, 5) and loaded.classes == ("0", "1", "2", "3")
    assert loaded.x_test.shape == (3, channels, 6, 5)


def test_an_npz_without_test_images_is_split_without_overlap(tmp_path):
    x = np.arange(30, dtype=np.uint8).repeat(16).reshape(30, 4, 4)
    np.savez(tmp_path / "mine.npz", x_train=x)
    loaded = datasets.load(tmp_path / "mine.npz")
    assert len(loaded.x_test) == 3
    assert sorted(np.concatenate([loaded.x_train, loaded.x_test])[:, 0, 0, 0]) == list(range(30))


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
        {"x_train": np.array([[None]])},
    ],
)
def test_an_npz_of_something_else_is_refused_by_name(arrays, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=r"mine\.npz|x_train|y_train|x_test"):
        datasets.load(tmp_path / "mine.npz")


def test_an_npz_cut_short_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=np.zeros((20, 4, 4), np.uint8))
    path = tmp_path / "mine.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"mine\.npz"):
        datasets.load(path)
