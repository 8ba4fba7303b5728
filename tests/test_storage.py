"""Files are whole or not there, whatever fails in between."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transferkit import errors
from transferkit.storage import atomic_path, sha256_of_file, write_bytes, write_json, write_text


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
