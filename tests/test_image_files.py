import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from art_pixeldefend.image_files import as_nchw, check_target, read_images, write_images


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


def test_a_folder_is_written_through_a_link_to_an_empty_one(tmp_path):
    (tmp_path / "in").mkdir(), (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    Image.new("L", (4, 4)).save(tmp_path / "in" / "a.png")
    found = read_images(tmp_path / "in")
    write_images(tmp_path / "link", found.levels, like=found)
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "real").iterdir()] == ["a.png"]


@pytest.mark.parametrize("check", [check_target, lambda path, like: write_images(path, like.levels, like)])
def test_targets_that_cannot_be_written_are_refused_by_name(check, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir(), (tmp_path / "empty.npy").mkdir()
    (tmp_path / "file").write_text("")
    Image.new("L", (4, 4)).save(tmp_path / "in" / "a.png")
    np.save(tmp_path / "in.npy", np.zeros((1, 4, 4), np.uint8))
    folder, array = read_images(tmp_path / "in"), read_images(tmp_path / "in.npy")
    for like, name in ((array, "empty.npy"), (array, "file/x.npy"), (array, "x.txt"), (folder, "file/x")):
        with pytest.raises(ValueError, match=name):
            check(tmp_path / name, like)
    monkeypatch.chdir(tmp_path / "empty.npy")
    with pytest.raises(ValueError, match="current folder"):
        check(".", folder)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_written_folder_and_its_files_have_the_mode_of_ordinary_ones(mask, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    found, before = read_images(tmp_path), os.umask(mask)
    try:
        write_images(tmp_path / "out", found.levels, like=found)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out" / "a.png").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_partial_is_left_when_writing_fails(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    found = read_images(tmp_path)
    with pytest.raises(TypeError):
        write_images(tmp_path / "out", [np.zeros((1, 4, 4), complex)], like=found)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_files_that_differ_by_their_suffix_only_are_refused(tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="suffix"):
        read_images(tmp_path)


def png(width, height, depth, colour):
    """A PNG file of this size, bit depth and colour type, all zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * width
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\0" * (bits // 8)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_images_of_more_than_8_bits_are_refused(colour, tmp_path):
    """Grey, RGB, each without and with transparency."""
    (tmp_path / "a.png").write_bytes(png(4, 4, 8, colour))
    assert read_images(tmp_path).levels.shape == (1, 1 if colour == 0 else 3, 4, 4)
    (tmp_path / "a.png").write_bytes(png(4, 4, 16, colour))
    with pytest.raises(ValueError, match=r"a\.png.* more than 8 bits"):
        read_images(tmp_path)


def test_a_bitmap_of_16_bits_a_pixel_is_read(tmp_path):
    """Its raw mode looks like that of 16 bits a channel; it has 5 or 6."""
    masks, pixels = struct.pack("<III", 0xF800, 0x7E0, 0x1F), b"\xff" * 4 * 4 * 2
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    start = 14 + len(header) + len(masks)
    content = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + masks + pixels
    (tmp_path / "a.bmp").write_bytes(content)
    assert read_images(tmp_path).levels.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_files_of_several_frames_are_refused(suffix, tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"a\.{suffix}.* 2 frames"):
        read_images(tmp_path)
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True)
    assert len(read_images(tmp_path).levels) == 1


def test_photographs_with_previews_of_themselves_are_one_image(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    red, green, blue = read_images(tmp_path).levels[0].mean(axis=(1, 2))
    assert red > 200 and green < 50 and blue < 50


def test_an_image_too_large_to_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png"):
        read_images(tmp_path)


def with_header(shape):
    """A .npy file whose header says that it holds uint8 of this shape, and that holds nothing."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize("shape", [(), (3,), (2**45, 28, 28), (2**80, 28, 28), (10, 28, 28)])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_malformed_arrays_are_refused_by_name(shape, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        path.write_bytes(with_header(shape))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", with_header(shape))
    with pytest.raises(ValueError, match=rf"a\.{suffix}"):
        read_images(path)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_single_number_is_refused_by_name(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    np.save(path, np.uint8(3)) if suffix == "npy" else np.savez(path, np.uint8(3))
    with pytest.raises(ValueError, match=rf"a\.{suffix}"):
        read_images(path)


@pytest.mark.parametrize(
    ("old", "new"), [(b"}", b"("), (b"'|u1'", b"'|O8'"), (b"'|u1'", b"'|x1'"), (b"NUMPY", b"numpy")]
)
def test_an_array_with_a_damaged_header_is_refused_by_name(old, new, tmp_path):
    (tmp_path / "a.npy").write_bytes(with_header((1, 4, 4)).replace(old, new) + bytes(16))
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_images(tmp_path / "a.npy")


def test_a_damaged_image_file_is_refused_by_name(tmp_path):
    """A TIFF whose first entry, the width, is another one: Pillow raises TypeError."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.tiff")
    content = bytearray((tmp_path / "a.tiff").read_bytes())
    entry = struct.unpack("<I", content[4:8])[0] + 2
    assert struct.unpack("<H", content[entry : entry + 2]) == (256,)
    content[entry : entry + 2] = struct.pack("<H", 255)
    (tmp_path / "a.tiff").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tiff"):
        read_images(tmp_path)


def test_an_archive_of_something_else_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x", "no array")
    with pytest.raises(ValueError, match=r"a\.npz.*'x'"):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(5, 2, 6, 7), (5, 6, 7, 2)])
def test_arrays_may_have_as_many_channels_as_are_asked_for(shape, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    found = read_images(tmp_path / "a.npy", [2])
    assert found.levels.shape == (5, 2, 6, 7)
    write_images(tmp_path / "b.npy", found.levels, like=found)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), images)
    with pytest.raises(ValueError, match=r"a\.npy.* 1 or 3"):
        read_images(tmp_path / "a.npy")
