"""Files are whole or not there, whatever fails in between."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from transferkit import errors
from transferkit.storage import atomic_path, lock, sha256_of_file, sweep, temporary_directory, write_bytes, write_json, write_text


def test_a_file_is_written_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one")
    write_bytes(tmp_path / "a", b"two")
    write_text(tmp_path / "b", "ä")
    write_json(tmp_path / "c", {"x": [1, 2]})
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "b").read_bytes() == "ä".encode()
    assert (tmp_path / "c").read_text() == '{\n "x": [\n  1,\n  2\n ]\n}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(b"two").hexdigest()


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(errors.StorageError) as caught:
        write_text(target, "new")
    assert str(caught.value) == (
        f"Writing {str(target)!r}.\n"
        "  found: No space left on device; the old file, if there was one, is untouched\n"
        "  to fix it: free some space and write again"
    )
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    script = (
        "import os, sys\n"
        "from transferkit.storage import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half of the n')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False, timeout=60)
    assert done.returncode == -9
    assert target.read_text() == "old"


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError) as caught:
        write_text(tmp_path, "x")
    assert caught.value.found == ("a directory of that name",)
    with pytest.raises(errors.StorageError) as caught:
        write_text(tmp_path / "none" / "x", "x")
    assert caught.value.found == (f"no directory {str(tmp_path / 'none')!r}",)


def test_a_link_is_followed_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_what_is_no_file_or_read_only_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.StorageError, match="a device, pipe or socket of that name"):
        write_text(tmp_path / "pipe", "x")
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(errors.StorageError, match="a file of that name that may not be written to"):
        write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "old"


@contextmanager
def holder(directory: Path, *, code: str = "with lock(sys.argv[1]):") -> Iterator[subprocess.Popen[str]]:
    """A process that holds a directory until it is told to end, or killed."""
    script = f"import os, sys\nfrom transferkit.storage import *\n{code}\n    print('held', flush=True); sys.stdin.read()\n"
    command = [sys.executable, "-c", script, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with holder(directory) as process:
        with pytest.raises(errors.StorageError) as caught, lock(directory):
            pass
        since = json.loads((directory / ".transferkit.lock").read_text())["since"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", since)
        assert str(caught.value) == (
            f"Locking {str(directory)!r}, so that no other run writes there.\n"
            f"  found: process {process.pid} on {socket.gethostname()} holds it, since {since}\n"
            "  likely cause: two runs in one directory would write over each other's files\n"
            f"  to fix it: wait until it ends, or stop it (kill {process.pid}); or give this run a directory of its own"
        )
        with lock(tmp_path / "another"):
            pass
        process.kill()
        process.wait()
        with lock(directory):  # what a killed process left is no obstacle
            pass


def test_a_directory_is_held_by_one_run_of_a_process(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(errors.StorageError, match=rf"this process \({os.getpid()}\) holds it itself"), lock(tmp_path):
            pass
        (tmp_path / ".transferkit.lock").write_text("")
        with pytest.raises(errors.StorageError, match="another process holds it"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_a_forked_child_does_not_hold_what_its_parent_held(tmp_path: Path) -> None:
    child = "if os.fork() == 0: os.write(w, b'.'); sys.stdin.read(); os._exit(0)"
    forks = f"with lock(sys.argv[1]):\n    r, w = os.pipe()\n    {child}\n    os.read(r, 1)"  # the child has let go by then
    with holder(tmp_path, code=forks) as process:
        os.kill(process.pid, 9)
        process.wait()
        with lock(tmp_path):  # the child still waits for its input
            pass


def test_a_lock_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="name a directory that you may write to"), lock(tmp_path / "file"):
        pass
    fcntl = pytest.importorskip("fcntl")

    def unknown(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.warns(UserWarning, match="lies on a file system without locks"), lock(tmp_path):
        pass


def test_temporaries_of_the_dead_are_removed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / ".transferkit-not-ours.tmp").mkdir()
    (tmp_path / ".transferkit-0123456789abcdef.tmp").mkdir()  # killed before it had its lock
    dies = "with atomic_path(sys.argv[1] + '/a') as temporary:\n    temporary.write_text('half')"
    with holder(tmp_path, code=dies) as process:
        sweep(tmp_path)
        assert len(set(tmp_path.glob(".transferkit-*.tmp"))) == 2
        process.kill()
        process.wait()
        assert len(set(tmp_path.glob(".transferkit-*.tmp"))) == 2
        with temporary_directory(tmp_path) as ours:
            write_text(tmp_path / "b", "x")
            assert ours.is_dir()
    assert sorted(os.listdir(tmp_path)) == [".transferkit-not-ours.tmp", "b"]
