"""Files that are written: whole or not at all, through links, not over what is read-only, with nothing left over."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from tolerances import HANG_SECONDS

from fastdiff.errors import ArgumentError, DataError
from fastdiff.files import check_ending, check_writable, writing, writing_together


def write(path, content=b"new"):
    with writing(path) as file:
        file.write(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    return path


# --------------------------------------------------------------------------------------- whole or not at all


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "x.bin"
    with writing(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there(old, failure):
    def write_half() -> None:
        with writing(old) as file:
            file.write(b"half of the new")
            file.flush()
            raise failure

    with pytest.raises(failure):
        write_half()
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["x.bin"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_disk_that_fails_leaves_what_was_there(old, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(DataError, match=r"x\.bin: cannot be written: No space left on device$"):
        write(old)
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["x.bin"]


def test_a_process_that_dies_leaves_what_was_there(old):
    """What it leaves besides is no obstacle."""
    code = (
        "import os, sys\nfrom fastdiff.files import writing\n"
        "with writing(sys.argv[1]) as file:\n    file.write(b'half')\n    file.flush()\n    os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(old)], timeout=HANG_SECONDS, check=False)
    assert done.returncode == 9
    assert old.read_bytes() == b"old"
    (leftover,) = (path for path in old.parent.iterdir() if path != old)
    assert leftover.name.startswith(".x.bin.")
    assert leftover.name.endswith(".tmp")
    write(old)
    assert old.read_bytes() == b"new"


def test_a_new_file_takes_the_old_one_s_place_at_once(old):
    # Whoever has the old file open goes on reading the old one, whole: nobody sees half of the new one.
    with old.open("rb") as reader:
        write(old)
        assert reader.read() == b"old"
    assert old.read_bytes() == b"new"


def test_two_writers_make_one_whole_file(tmp_path):
    path, contents = tmp_path / "x.bin", [bytes([65 + k]) * 5000 for k in range(4)]
    together = threading.Barrier(4)

    def one(content):
        with writing(path) as file:
            together.wait()
            for start in range(0, len(content), 100):
                file.write(content[start : start + 100])

    writers = [threading.Thread(target=one, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["x.bin"]


# --------------------------------------------------------------------------------------- links and permissions


def test_a_written_file_has_the_usual_permissions(old, tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    write(old)
    assert old.stat().st_mode == usual.stat().st_mode


def test_a_link_is_written_through(old, tmp_path):
    link, second = tmp_path / "link.bin", tmp_path / "second.bin"
    link.symlink_to(old)
    second.symlink_to("link.bin")
    write(second)
    assert link.is_symlink()
    assert second.is_symlink()
    assert old.read_bytes() == b"new"
    assert names(tmp_path) == ["link.bin", "second.bin", "x.bin"]


def test_the_temporary_file_lies_beside_what_a_link_points_at(tmp_path):
    """Where it is on another file system than the link, it could not be renamed otherwise."""
    there = tmp_path / "there"
    there.mkdir()
    link = tmp_path / "link.bin"
    link.symlink_to(there / "x.bin")  # which does not exist yet
    with writing(link):
        assert names(tmp_path) == ["link.bin", "there"]
        assert len(names(there)) == 1
    assert names(there) == ["x.bin"]


def test_a_failure_behind_a_link_leaves_both(old, tmp_path):
    link = tmp_path / "link.bin"
    link.symlink_to(old)
    with pytest.raises(RuntimeError), writing(link):
        raise RuntimeError
    assert link.is_symlink()
    assert old.read_bytes() == b"old"


def test_a_hard_link_keeps_the_old_content(old, tmp_path):
    other = tmp_path / "other.bin"
    other.hardlink_to(old)
    write(old)
    assert other.read_bytes() == b"old"


@pytest.fixture
def read_only(old, monkeypatch):
    """To the superuser nothing is read-only, so what the system says of it is pretended."""
    old.chmod(0o444)
    if os.access(old, os.W_OK):
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != old and access(path, mode))
    return old


def test_a_read_only_file_is_not_replaced(read_only, tmp_path):
    link = tmp_path / "link.bin"
    link.symlink_to(read_only)
    for path in (read_only, link):
        for act in (write, check_writable):
            with pytest.raises(DataError, match=rf"{path.name}: cannot be written: the file there is read-only$"):
                act(path)
    assert read_only.read_bytes() == b"old"
    assert names(tmp_path) == ["link.bin", "x.bin"]


# --------------------------------------------------------------------------------------- paths


def test_unwritable_paths(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.bin").mkdir()
    for path, reason in [
        (tmp_path / "none" / "x.bin", "there is no folder"),
        (tmp_path / "file" / "x.bin", "there is no folder"),
        (tmp_path / "folder.bin", "is a folder"),
        (tmp_path / ("x" * 300 + ".bin"), "too long"),
    ]:
        for act in (write, check_writable):
            with pytest.raises(DataError, match=rf"{path.name}: cannot be written: .*{reason}"):
                act(path)
    assert names(tmp_path) == ["file", "folder.bin"]


@pytest.mark.parametrize("name", ["x" * 251 + ".bin", "\N{SNOWMAN}" * 83 + ".bin", ".hidden", "a b\n.bin"], ids=len)
def test_any_name_that_the_system_takes(tmp_path, name):
    path = tmp_path / name
    with suppress(OSError):
        path.touch()
    assert path.exists()
    write(path)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [name]


def test_paths_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("x.bin", Path("x.bin"), str(tmp_path / "x.bin"), "./x.bin"):
        write(path, os.fspath(path).encode())
        assert Path("x.bin").read_bytes() == os.fspath(path).encode()


def test_check_writable_touches_nothing(tmp_path):
    path = tmp_path / "x.bin"
    check_writable(path)
    assert not names(tmp_path)
    path.write_bytes(b"old")
    check_writable(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin"]


def test_endings(tmp_path):
    assert check_ending("a/b.CSV", (".csv", ".npy")) == ".csv"
    for known, wants in (
        ((".csv",), r"\.csv"),
        ((".a", ".b"), r"\.a or \.b"),
        ((".a", ".b", ".c"), r"\.a, \.b or \.c"),
    ):
        for act in (check_ending, check_writable):
            with pytest.raises(ArgumentError, match=rf"^path: got .*x\.txt', wants a file name that ends in {wants}$"):
                act(tmp_path / "x.txt", known)
    assert not names(tmp_path)


# ------------------------------------------------------------------------------------------- what is no file, and rests


def test_modes_of_replaced_files_stay(tmp_path):
    path = tmp_path / "x.bin"
    for mode in (0o600, 0o640, 0o755):
        path.write_bytes(b"old")
        path.chmod(mode)
        write(path)
        assert path.stat().st_mode & 0o777 == mode
        assert path.read_bytes() != b"old"


def test_what_is_left_of_killed_writers_is_removed_and_what_is_being_written_is_not(tmp_path):
    path = tmp_path / "x.bin"
    for rest in (".x.bin.0123456789ab.tmp", ".x.bin.0123456789ab.txt", ".y.bin.0123456789ab.tmp"):
        (tmp_path / rest).write_bytes(b"rest")
    with writing(path) as first:
        first.write(b"first")
        write(path)
    assert path.read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == [".x.bin.0123456789ab.txt", ".y.bin.0123456789ab.tmp", "x.bin"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no pipes")
def test_a_pipe_is_neither_replaced_nor_waited_for(tmp_path):
    import fastdiff as fd
    from fastdiff import interop
    from fastdiff.errors import FastdiffError

    for name in ("pipe", "m.safetensors", "x.csv", "x.npy", "config.json", "one.png"):
        os.mkfifo(tmp_path / name)
    acts = {
        "pipe: cannot be written: is a pipe": lambda: write(tmp_path / "pipe"),
        "m.safetensors: .*is a pipe": lambda: fd.load(tmp_path / "m.safetensors"),
        "x.csv: cannot be read: is a pipe": lambda: fd.data.load_curves(tmp_path / "x.csv"),
        "x.npy: cannot be read: is a pipe": lambda: fd.data.load_curves(tmp_path / "x.npy"),
        "config.json: .*is a pipe": lambda: interop.load_scheduler(tmp_path / "config.json", 5),
        r"one.png \(is a pipe": lambda: fd.data.load_images(tmp_path, 8),
    }
    for message, act in acts.items():
        with pytest.raises(FastdiffError, match=message):
            act()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_two_files_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with writing_together(paths) as (a, b):
        a.write(b"1")
        b.write(b"1")

    def fail():
        with writing_together(paths) as (a, _):
            a.write(b"2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(DataError, match="nowhere"), writing_together([tmp_path / "a", tmp_path / "nowhere" / "b"]):
        pass
    assert [path.read_bytes() for path in paths] == [b"1", b"1"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_a_killed_process_has_not_renamed_stays_until_both_are_there(tmp_path):
    """It may be the only half that fits the first file, so a second process that is killed must not take it away."""
    paths = [tmp_path / "a", tmp_path / "b"]
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom fastdiff.files import writing_together\n"
        "renamed = []\nreplace = Path.replace\n"
        "def once(self, target):\n"
        "    if len(renamed) == int(sys.argv[1]):\n        os._exit(9)\n"
        "    renamed.append(replace(self, target))\n"
        "Path.replace = once\n"
        "with writing_together(sys.argv[3:]) as files:\n"
        "    for file in files:\n        file.write(sys.argv[2].encode())"
    )

    def killed(renames, text):
        args = [sys.executable, "-c", code, str(renames), text, *map(str, paths)]
        assert subprocess.run(args, timeout=HANG_SECONDS, check=False).returncode == 9

    def left():
        return sorted(path.read_text() for path in tmp_path.glob(".b.*.tmp"))

    killed(1, "1")
    assert (paths[0].read_text(), left()) == ("1", ["1"])
    killed(0, "2")
    assert (paths[0].read_text(), left()) == ("1", ["1", "2"])
    with writing_together(paths) as files:
        for file in files:
            file.write(b"3")
    assert [path.read_text() for path in paths] == ["3", "3"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_where_the_second_rename_fails_its_file_stays_beside_the_first(error, tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b"]

    def both(text):
        with writing_together(paths) as files:
            for file in files:
                file.write(text)

    def once(path, target, replace=Path.replace):
        if target.name == "b":
            raise error
        return replace(path, target)

    both(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", once)
        with pytest.raises((DataError, KeyboardInterrupt)):
            both(b"2")
    left = [path.read_bytes() for path in tmp_path.glob(".b.*.tmp")]
    assert [paths[0].read_bytes(), paths[1].read_bytes(), left] == [b"2", b"1", [b"2"]]
    both(b"3")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_ctrl_c_between_two_renames_comes_after_both(tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b"]

    def interrupted(path, target, replace=Path.replace):
        replace(path, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "replace", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt), writing_together(paths):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="this platform cannot lock a folder")
def test_two_that_write_the_same_two_files_rename_one_after_the_other(tmp_path, monkeypatch):
    """Else the second file of the one may come to stand beside the first of the other."""
    paths, renamed, written_too = [tmp_path / "a", tmp_path / "b"], threading.Event(), threading.Event()

    def slowly(path, target, replace=Path.replace):
        replace(path, target)
        if threading.current_thread() is other and not renamed.is_set():
            renamed.set()
            written_too.wait(0.2)

    def both(text):
        with writing_together(paths) as files:
            for file in files:
                file.write(text)

    monkeypatch.setattr(Path, "replace", slowly)
    other = threading.Thread(target=both, args=(b"1",))
    other.start()
    assert renamed.wait(HANG_SECONDS)
    both(b"2")
    written_too.set()
    other.join()
    assert [path.read_bytes() for path in paths] == [b"2", b"2"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
