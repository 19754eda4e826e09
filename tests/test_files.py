import os

import pytest

from art_pixeldefend.files import check_file, check_folder, write_atomically


@pytest.fixture
def places(tmp_path):
    """A file, an empty folder, a full one, and a link to each folder."""
    (tmp_path / "file").write_text("")
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / f"link-to-{name}").symlink_to(tmp_path / name)
    (tmp_path / "full" / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize("name", ["new", "deep/er/new", "file", "empty/new", "link-to-full/file", "link-to-empty/new"])
def test_a_file_may_go_over_a_file_or_where_nothing_is(name, places):
    before = sorted(places.rglob("*"))
    check_file(places / name)
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize("name", ["empty", "full", "link-to-empty", "file/new", "file/deep/er/new", "full/file/new"])
def test_a_file_may_not_go_over_a_folder_or_into_a_file(name, places):
    with pytest.raises(ValueError, match=rf"{name}.*folder"):
        check_file(places / name)


def test_a_device_may_be_written_to_as_a_file():
    check_file(os.devnull)


@pytest.mark.parametrize("name", ["new", "deep/er/new", "empty", "link-to-empty", "full/new"])
def test_a_folder_may_go_over_an_empty_one_or_where_nothing_is(name, places):
    check_folder(places / name)


@pytest.mark.parametrize("name", ["full", "link-to-full", "file", "file/new", "file/deep/er/new"])
def test_a_folder_may_not_go_over_what_is_there_or_into_a_file(name, places):
    with pytest.raises(ValueError, match=rf"{name}.*folder"):
        check_folder(places / name)


def test_the_current_folder_may_not_be_replaced(places, monkeypatch):
    monkeypatch.chdir(places / "empty")
    for name in (".", "", places / "link-to-empty"):
        with pytest.raises(ValueError, match="current folder"):
            check_folder(name)


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_place_without_permission_is_refused(check, places, monkeypatch):
    monkeypatch.setattr("os.access", lambda folder, mode: folder != places / "empty")
    check(places / "new")
    with pytest.raises(ValueError, match=r"deep/new.*permission"):
        check(places / "empty" / "deep" / "new")


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


def test_an_atomic_write_makes_ordinary_files_and_leaves_the_process_alone(tmp_path, monkeypatch):
    (tmp_path / "ordinary").write_text("")

    def refuse(mask):
        raise AssertionError("the umask is every thread's")

    monkeypatch.setattr("os.umask", refuse)
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
