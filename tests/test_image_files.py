import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from art_pixeldefend.files import write_atomically
from art_pixeldefend.image_files import as_nchw, read_images, write_images


@given(
    layout=st.sampled_from(["NHW", "NHWC", "NCHW"]), channels=st.sampled_from([1, 3]),
    sizes=st.tuples(st.integers(0, 3), st.integers(4, 7), st.integers(4, 7)), suffix=st.sampled_from([".npy", ".npz"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_an_array_is_written_back_as_it_was_read(tmp_path_factory, layout, channels, sizes, suffix):
    folder = tmp_path_factory.mktemp("arrays")
    count, height, width = sizes
    shape = {"NHW": (), "NHWC": (channels,), "NCHW": ()}[layout]
    shape = (count, channels, height, width) if layout == "NCHW" else (count, height, width, *shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = folder / f"in{suffix}"
    np.save(path, images) if suffix == ".npy" else np.savez(path, images)
    found = read_images(path)
    assert found.levels.shape == (count, 1 if layout == "NHW" else channels, height, width)
    write_images(folder / f"out{suffix}", found.levels, like=found)
    again = np.load(folder / f"out{suffix}")
    np.testing.assert_array_equal(again if suffix == ".npy" else again["x"], images)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_written_back_with_its_names_and_subfolders(channels, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (3, 7, 5, channels), dtype=np.uint8)
    for name, image in zip(("a.png", "b/c.bmp", "b/d.png"), levels, strict=True):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(tmp_path / "in" / name)
    found = read_images(tmp_path / "in")
    np.testing.assert_array_equal(found.levels, as_nchw("levels", levels))
    write_images(tmp_path / "out", found.levels, like=found)
    assert list(read_images(tmp_path / "out").names) == ["a.png", "b/c.png", "b/d.png"]
    np.testing.assert_array_equal(read_images(tmp_path / "out").levels, found.levels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_one_coloured_image_makes_all_of_them_coloured(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "red.png")
    assert read_images(tmp_path).levels.shape == (2, 3, 4, 4)


def test_images_of_several_sizes_and_files_that_are_none_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        read_images(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 5)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png"):
        read_images(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"b\.png"):
        read_images(tmp_path)


def test_an_existing_folder_is_not_written_over(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    found = read_images(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        write_images(tmp_path, found.levels, like=found)


def test_nothing_partial_is_left_when_writing_fails(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    found = read_images(tmp_path)
    with pytest.raises(TypeError):
        write_images(tmp_path / "out", [np.zeros((1, 4, 4), complex)], like=found)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_atomic_write_replaces_whole_files_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_text() == "new"

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "newest")
    assert path.read_text() == "new" and [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_an_atomic_write_keeps_links_and_what_is_no_file(tmp_path):
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to(real)
    write_atomically(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)


def test_files_that_differ_by_their_suffix_only_are_refused(tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="suffix"):
        read_images(tmp_path)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="8 bits"):
        read_images(tmp_path)


def test_an_atomic_write_makes_ordinary_files_and_leaves_the_process_alone(tmp_path, monkeypatch):
    (tmp_path / "ordinary").write_text("")

    def refuse(mask):
        raise AssertionError("the umask is every thread's")

    monkeypatch.setattr("os.umask", refuse)
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
