import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from art_pixeldefend import image_files
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


def test_arrays_that_are_not_levels_are_refused_with_the_layouts_and_the_conversion(tmp_path):
    x = np.random.default_rng(0).random((2, 1, 6, 5))
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy must be uint8 images \(N, C, H, W\).*float64") as error:
        read_images(tmp_path / "x.npy")
    conversion = str(error.value).partition("values of 0 to 1 by ")[2]
    np.save(tmp_path / "x.npy", eval(conversion, {"np": np, "x": x}))
    assert np.abs(read_images(tmp_path / "x.npy").levels / 255 - x).max() <= 0.5 / 255 + 1e-9
    np.save(tmp_path / "x.npy", x.astype(np.int64))
    with pytest.raises(ValueError, match=r"uint8 images .*got int64 of shape \(2, 1, 6, 5\)$"):
        read_images(tmp_path / "x.npy")


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


def test_existing_results_are_replaced_only_if_told_to(tmp_path):
    for name in ("in/a.png", "out/a.png", "out/deep/b.png", "other/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (4, 4), len(name)).save(tmp_path / name)
    (tmp_path / "other" / "notes.txt").write_text("mine")
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 4), np.uint8))
    for source, target in (("in", "out"), ("in", "other"), ("x.npy", "x.npy")):
        found = read_images(tmp_path / source)
        with pytest.raises(ValueError, match=rf"{target}.*overwrite"):
            write_images(tmp_path / target, found.levels, like=found)
    with pytest.raises(ValueError, match=r"other.*notes\.txt"):
        write_images(tmp_path / "other", found.levels, like=read_images(tmp_path / "in"), overwrite=True)
    write_images(tmp_path / "x.npy", found.levels + 1, like=found, overwrite=True)
    assert np.load(tmp_path / "x.npy").min() == 1
    found = read_images(tmp_path / "in")
    write_images(tmp_path / "out", found.levels, like=found, overwrite=True)
    assert list(read_images(tmp_path / "out").names) == ["a.png"]  # nothing of the earlier run is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out", "x.npy"]


@pytest.mark.parametrize("name", [".", "deep", "link", "link/deep"])
def test_the_images_that_are_read_are_not_replaced(name, tmp_path):
    (tmp_path / "deep" / "in").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "deep" / "in" / "a.png")
    found = read_images(tmp_path / "deep" / "in")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="holds the images"):
        write_images(tmp_path / name, found.levels, like=found, overwrite=True)


def test_results_may_be_written_into_the_folder_of_the_images_and_are_not_read_then(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for _ in range(2):
        found = read_images(tmp_path, exclude=tmp_path / "out")
        assert list(found.names) == ["a.png"]
        with pytest.warns(UserWarning, match="out.*inside"):
            write_images(tmp_path / "out", found.levels, like=found, overwrite=True)
    assert list(read_images(tmp_path).names) == ["a.png", "out/a.png"]


ORIENTATIONS = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.T, 6: lambda x: x.T[::-1], 7: lambda x: x[::-1, ::-1].T, 8: lambda x: x.T[:, ::-1],
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "mpo.jpg"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_orientation_of_a_photograph_is_applied(orientation, suffix, tmp_path):
    """``ORIENTATIONS`` turn an upright image into what a camera stores with that number."""
    upright = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((8, 8))).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](upright))).convert("RGB")
    options = {"format": "MPO", "save_all": True, "append_images": [stored]} if suffix == "mpo.jpg" else {}
    options |= {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix.endswith("jpg") else {}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    levels = read_images(tmp_path).levels
    assert levels.shape == (1, 3, 16, 24)
    assert np.abs(levels[0, 0].astype(int) - upright).max() <= (3 if suffix.endswith("jpg") else 0)


def palette_with_transparency(alpha):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = bytes([255, alpha])
    return image


def grey_with_a_transparent_level(alpha):
    image = Image.fromarray(np.array([[0, 7], [7, 0]], np.uint8))
    image.info["transparency"] = 7 if alpha < 255 else 8
    return image


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda alpha: Image.new("RGBA", (2, 2), (1, 2, 3, alpha)), 3),
        (lambda alpha: Image.new("LA", (2, 2), (1, alpha)), 1),
        (palette_with_transparency, 3),
        (grey_with_a_transparent_level, 1),
    ],
)
def test_transparency_is_never_dropped_silently(make, channels, suffix, tmp_path):
    """What is opaque everywhere loses nothing by being read without transparency."""
    path = tmp_path / f"a.{suffix}"
    for alpha in (0, 254, 255):
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        make(alpha).save(path, **options)
        with Image.open(path) as image:
            kept = image.has_transparency_data
        if alpha < 255 and kept:
            with pytest.raises(ValueError, match=r"a\..*transparent"):
                read_images(tmp_path)
        elif suffix != "webp":  # which has no grey
            assert kept or suffix == "tiff"  # which has no transparent levels or colours
            assert read_images(tmp_path).levels.shape == (1, channels, 2, 2)


def test_hidden_files_and_folders_and_runs_are_skipped_and_links_to_folders_followed(tmp_path):
    """And whatever else lies about without an image suffix."""
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for name in ("images/a.png", "images/cats/b.png", "elsewhere/c.png", "images/.ipynb_checkpoints/a.png",
                 "images/.hidden.png", "images/run/samples.png", "images/folder.png/d.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    for name in (
        "._a.png",
        "run/metrics.jsonl",
        "run/checkpoint.safetensors",
        "Thumbs.db",
        "desktop.ini",
        "cats/x.txt",
    ):
        (folder / name).write_bytes(b"\0\5\x16\7no image")
    (folder / "dogs").symlink_to(elsewhere)
    (folder / "e.png").symlink_to(elsewhere / "c.png")
    (folder / "cats" / "loop").symlink_to(folder)
    (elsewhere / "loop").symlink_to(elsewhere)
    names = ["a.png", "cats/b.png", "dogs/c.png", "e.png", "folder.png/d.png"]
    assert list(read_images(folder).names) == names
    (folder / "samples.png").write_bytes(b"of another size")
    for name in ("metrics.jsonl", "model.safetensors"):
        (folder / name).touch()  # train --out images
    (tmp_path / ".link").symlink_to(folder)
    assert list(read_images(tmp_path / ".link").names) == names  # hidden, but asked for by name


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere.png"), os.mkfifo])
def test_what_looks_like_an_image_and_cannot_be_read_is_refused_by_name(make, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png"):
        read_images(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
def test_grey_images_in_any_mode_are_read_for_a_model_of_either_kind(mode, tmp_path):
    grey = np.random.default_rng(0).integers(0, 2, (4, 5), dtype=np.uint8) * 255
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_images(tmp_path, [1]).levels, grey[None, None])
    np.testing.assert_array_equal(read_images(tmp_path, [3]).levels, np.stack([grey] * 3)[None])
    expected = 1 if mode in ("1", "L", "LA") else 3
    assert read_images(tmp_path).levels.shape[1] == expected


def test_a_coloured_image_is_refused_by_name_where_grey_ones_are_expected(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.fromarray(np.eye(4, dtype=np.uint8)[..., None] * np.array([1, 1, 2], np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png.*colour"):
        read_images(tmp_path, [1])
    with pytest.raises(ValueError, match="2 channels"):
        read_images(tmp_path, [2])


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
    (tmp_path / "in").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "in" / "a.png")
    found, before = read_images(tmp_path / "in"), os.umask(mask)
    try:
        write_images(tmp_path / "out", found.levels, like=found)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out" / "a.png").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_partial_is_left_when_writing_fails(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "in" / "a.png")
    found = read_images(tmp_path / "in")
    with pytest.raises(TypeError):
        write_images(tmp_path / "out", [np.zeros((1, 4, 4), complex)], like=found)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_files_that_differ_by_their_suffix_only_are_read_and_refused_where_they_would_be_written_to_one(tmp_path):
    (tmp_path / "in").mkdir()
    for level, name in enumerate(("a.bmp", "a.png", "b.png")):
        Image.new("L", (4, 4), level).save(tmp_path / "in" / name)
    found = read_images(tmp_path / "in")
    assert list(found.names) == ["a.bmp", "a.png", "b.png"] and list(found.levels[:, 0, 0, 0]) == [0, 1, 2]
    for check in (check_target, lambda path, like: write_images(path, like.levels, like)):
        with pytest.raises(ValueError, match=r"a\.bmp.*a\.png.*suffix"):
            check(tmp_path / "out", found)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def png(width, height, depth, colour):
    """A PNG file of this size, bit depth and colour type, all ones."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * width
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * (bits // 8)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_images_of_more_than_8_bits_are_refused(colour, tmp_path):
    """Grey, RGB, each without and with transparency."""
    (tmp_path / "a.png").write_bytes(png(4, 4, 8, colour))
    assert read_images(tmp_path).levels.shape == (1, 1 if colour in (0, 4) else 3, 4, 4)
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
    np.save(tmp_path / "grey.npy", images[..., 0])
    with pytest.raises(ValueError, match=r"grey\.npy.* is 3"):
        read_images(tmp_path / "grey.npy", [3])


# Images that are read when they are needed


@pytest.mark.parametrize("form", ["npy", "npz", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_hold_the_images_that_are_read_at_once(form, channels, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (7, channels, 4, 5), np.uint8)
    path = tmp_path / f"x.{form}"
    if form == "folder":
        path.mkdir()
        for i, image in enumerate(x):
            Image.fromarray(image[0] if channels == 1 else np.moveaxis(image, 0, -1)).save(path / f"{i}.png")
    else:
        np.save(path, np.moveaxis(x, 1, -1)) if form == "npy" else np.savez(path, x=x)
    found = image_files.open_images(path, channels)
    batches = list(found.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), x)
    assert list(found.names) == list(image_files.read_images(path, (channels,)).names)


def test_a_file_is_read_with_its_batch_only(tmp_path, monkeypatch):
    for i in range(4):
        Image.new("L", (4, 4 if i < 3 else 5)).save(tmp_path / f"{i}.png")
    read = []
    one = image_files._read_file
    monkeypatch.setattr(image_files, "_read_file", lambda path: read.append(path.name) or one(path))
    batches = image_files.open_images(tmp_path, 1).batches(2)
    assert read == []
    assert next(batches).shape == (2, 1, 4, 4) and read == ["0.png", "1.png"]
    with pytest.raises(ValueError, match=r"3\.png' has 5 x 4 pixels"):
        next(batches)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array"])
def test_a_damaged_array_is_refused_when_it_is_opened(content, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npy"):
        image_files.open_images(tmp_path / "x.npy", 1)


def test_images_read_in_batches_are_decoded_once_but_for_the_first(tmp_path, monkeypatch):
    for i in range(7):
        Image.new("L", (3, 4), i).save(tmp_path / f"{i}.png")
    decoded, read = [], image_files._read_file
    monkeypatch.setattr(image_files, "_read_file", lambda path: decoded.append(path.name) or read(path))
    batches = list(image_files.open_images(tmp_path, 1).batches(2))
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == list(range(7))
    assert sorted(decoded) == ["0.png", *(f"{i}.png" for i in range(7))]
