import csv
import os
import subprocess
import sys

import pytest

from art_pixeldefend.files import check_file, check_folder, replacing, write_atomically, write_csv


@pytest.fixture
def places(tmp_path):
    """A file, an empty folder, folders of PNG files and of others, and a link to each folder."""
    (tmp_path / "file").write_text("")
    for name in ("empty", "full", "pictures"):
        (tmp_path / name).mkdir()
        (tmp_path / f"link-to-{name}").symlink_to(tmp_path / name)
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "pictures" / "deep").mkdir()
    (tmp_path / "pictures" / "deep" / "a.png").write_text("")
    return tmp_path


@pytest.mark.parametrize("name", ["new", "deep/er/new", "empty/new", "link-to-empty/new"])
def test_a_new_file_may_be_written(name, places):
    before = sorted(places.rglob("*"))
    check_file(places / name)
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize("name", ["file", "link-to-full/file"])
def test_an_existing_file_is_replaced_only_if_told_to(name, places):
    with pytest.raises(ValueError, match=rf"{name}.*exists already; overwrite=True"):
        check_file(places / name)
    check_file(places / name, overwrite=True)


@pytest.mark.parametrize("name", ["empty", "full", "link-to-empty", "file/new", "file/deep/er/new", "full/file/new"])
def test_a_file_may_not_replace_a_folder_or_be_inside_a_file(name, places):
    with pytest.raises(ValueError, match=rf"{name}.*folder"):
        check_file(places / name, overwrite=True)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "/dev/stderr"])
def test_devices_and_descriptors_may_be_written_to(name):
    check_file(name)


@pytest.mark.parametrize("suffix", [None, ".png"])
@pytest.mark.parametrize("name", ["new", "deep/er/new", "empty", "link-to-empty", "full/new"])
def test_a_folder_may_be_new_or_empty(name, suffix, places):
    check_folder(places / name, suffix=suffix)


@pytest.mark.parametrize("name", ["pictures", "link-to-pictures"])
def test_a_folder_that_is_not_empty_is_written_to_only_if_told_to(name, places):
    with pytest.raises(ValueError, match=rf"{name}.*folder.*overwrite=True"):
        check_folder(places / name)
    check_folder(places / name, overwrite=True)
    check_folder(places / name, overwrite=True, suffix=".png")


@pytest.mark.parametrize("name", ["full", "link-to-full"])
def test_a_folder_that_holds_other_files_is_never_replaced(name, places):
    check_folder(places / name, overwrite=True)
    with pytest.raises(ValueError, match=rf"{name}.*'.*{name}/file'"):
        check_folder(places / name, overwrite=True, suffix=".png")


def test_a_folder_that_holds_links_is_never_replaced(places):
    (places / "pictures" / "b.png").symlink_to(places / "file")
    with pytest.raises(ValueError, match=r"b\.png"):
        check_folder(places / "pictures", overwrite=True, suffix=".png")


@pytest.mark.parametrize("name", ["file", "file/new", "file/deep/er/new"])
def test_a_folder_may_not_replace_a_file_or_be_inside_one(name, places):
    with pytest.raises(ValueError, match=rf"{name}.*folder"):
        check_folder(places / name, overwrite=True)


def test_the_current_folder_is_not_replaced(places, monkeypatch):
    monkeypatch.chdir(places / "empty")
    for name in (".", "", places / "link-to-empty"):
        check_folder(name)
        with pytest.raises(ValueError, match="current folder"):
            check_folder(name, suffix=".png")


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


@pytest.mark.parametrize("failing", ["yield", "fsync", "replace"])
def test_a_folder_is_replaced_whole_or_not_at_all(failing, tmp_path, monkeypatch):
    def write(name):
        with replacing(tmp_path / "folder") as partial:
            (partial / "deep").mkdir(parents=True)
            (partial / "deep" / name).write_text(name)
            if failing == "yield" and name == "third":
                raise OSError("no space left")

    def fail(*arguments):
        raise OSError("no space left")

    write("first"), write("second")
    if failing != "yield":
        monkeypatch.setattr(f"os.{failing}", fail)
    with pytest.raises(OSError, match="no space"):
        write("third")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder" / "deep").iterdir()] == ["second"]


@pytest.mark.parametrize("folder", [False, True])
def test_everything_is_on_the_disk_before_and_the_entry_after_the_rename(folder, tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr("os.replace", lambda *paths: events.append("rename") or replace(*paths))
    with replacing(tmp_path / "x") as partial:
        written = [partial / "a", partial, partial / "b", partial / "b" / "c"] if folder else [partial]
        if folder:
            (partial / "b").mkdir(parents=True)
            (partial / "a").touch(), (partial / "b" / "c").touch()
        else:
            partial.touch()
    assert events[-2:] == ["rename", str(tmp_path)] and sorted(events[:-2]) == sorted(map(str, written))


def test_a_file_does_not_replace_a_folder(places):
    with pytest.raises(OSError):
        write_atomically(places / "full", "x")
    assert (places / "full" / "file").exists() and not list(places.glob(".*"))


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError("invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", files_only)
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def test_an_atomic_write_keeps_links_and_writes_to_what_is_not_a_regular_file(tmp_path):
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


def test_a_descriptor_is_appended_to(tmp_path):
    """``command --out /dev/stdout >> file``, and the same of another descriptor and of a link to one."""
    code = """if True:
        import os, sys
        from art_pixeldefend.files import check_file, write_atomically
        os.symlink("/dev/fd/2", "link")
        print("before")
        for name in ("/dev/stdout", "/dev/fd/1", "link", "/dev/stderr"):
            check_file(name)
            write_atomically(name, f"{name}\\n")
        print("after")"""
    for mode in ("w", "a"):
        (tmp_path / "1").write_text("kept\n"), (tmp_path / "2").write_text("kept\n")
        (tmp_path / "link").unlink(missing_ok=True)
        with (tmp_path / "1").open(mode) as out, (tmp_path / "2").open(mode) as err:
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=out, stderr=err, check=True)
        kept = "kept\n" if mode == "a" else ""
        assert (tmp_path / "1").read_text() == f"{kept}before\n/dev/stdout\n/dev/fd/1\nafter\n"
        assert (tmp_path / "2").read_text() == f"{kept}link\n/dev/stderr\n"


def test_an_atomic_write_makes_ordinary_files_and_leaves_the_process_alone(tmp_path, monkeypatch):
    (tmp_path / "ordinary").write_text("")

    def refuse(mask):
        raise AssertionError("the umask is shared by all threads")

    monkeypatch.setattr("os.umask", refuse)
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    names, numbers = ["a, b", 'say "x"', "c\nd"], [0.1 + 0.2, 1e-300, 3.0]
    write_csv(tmp_path / "x.csv", {"name": names, "number": numbers})
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names and [float(row["number"]) for row in rows] == numbers
