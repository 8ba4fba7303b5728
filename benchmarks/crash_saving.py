"""What is left of a good file when the process that saves over it dies or the disk refuses: the library's savers and Keras's.

    python benchmarks/crash_saving.py result.json [--kills 500] [--offsets 50]

Each kind of file is saved over by forked children, which are killed at random moments; stopped at each call to the system that
changes a file, where the call fails, is the last, or finds the disk full from then on (Linux on x86-64); and held to a size of
file at evenly spread offsets. After each the file must load as the old version or as the new one. As root, the disk is also
really full: a file system in memory of so few bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import crashing
import keras
import tensorflow as tf
from crashing import Kind, Saved, Tally
from kinds_of_files import kinds

import transferkit as tk
from transferkit.errors import TransferKitError


def truly_full(kind: Kind, times: int, told: tuple[type[BaseException], ...]) -> Tally:
    """Saves on a file system that has room for the old file and for a part of the new one."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        mount = Path(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", name], check=True)
        try:
            over = Saved(kind, mount / "files", told=told)
            size = sum(path.stat().st_size for path in over.folder.rglob("*") if path.is_file())
            for number in range(times):
                (mount / "filling").unlink(missing_ok=True)
                room = os.statvfs(name)
                left = size * number // times
                (mount / "filling").write_bytes(bytes(max(room.f_bavail * room.f_frsize - left, 0)))
                status = os.waitpid(over.start(), 0)[1]
                (mount / "filling").unlink()
                over.look(tally, f"room for {left} of {size} bytes", status)
        finally:
            subprocess.run(["umount", name], check=True)
    return tally


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", name], check=False).returncode:
            return False
        subprocess.run(["umount", name], check=True)
        return True


def rows_of(kind: Kind, folder: Path, kills: int, offsets: int, *, ours: bool) -> dict[str, dict[str, Any]]:
    told = (TransferKitError,) if ours else (Exception,)
    over = Saved(kind, folder, told=told)
    ways: dict[str, Callable[[], Tally]] = {
        "killed at random": lambda: crashing.killed_at_random(over, kills),
        "file size limited": lambda: crashing.full_at_offsets(over, offsets),
    }
    if can_mount():
        ways["disk full"] = lambda: truly_full(kind, offsets, told)
    if crashing.CAN_TRACE:
        for fault in ("killed", "fails", "full"):
            ways[f"each call {fault}"] = lambda fault=fault: crashing.at_each_call(over, fault)  # type: ignore[misc]
    found = {}
    for way, run in ways.items():
        begun = time.perf_counter()
        tally = run()
        print(f"{kind.name:38} {way:20} {tally}; untold {len(tally.untold)}, littered {len(tally.littered)}", flush=True)
        found[way] = {
            "faults": tally.faults,
            **{name: tally.counts[name] for name in ("old", "new", "lost")},
            "untold": tally.untold[:20],
            "lost at": tally.lost[:20],
            "littered": tally.littered[:20],
            "seconds": round(time.perf_counter() - begun, 1),
        }
    if ours and not over.is_clean():
        raise SystemExit(f"{kind.name}: temporaries are left after the next save")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--offsets", type=int, default=50)
    parser.add_argument("--folder", help="where files are written; by default memory, where there is such a place")
    given = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    where = given.folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=where) as name:
        for ours in (True, False):
            for number, kind in enumerate(kinds(of_keras=not ours)):
                who = "transferkit" if ours else "keras"
                folder = Path(name) / f"{who}-{number}"
                results[f"{who}: {kind.name}"] = rows_of(kind, folder, given.kills, given.offsets, ours=ours)
    versions = {"transferkit": tk.__version__, "python": platform.python_version(), "keras": keras.__version__}
    versions |= {"tensorflow": tf.__version__, "system": platform.platform()}
    Path(given.result).write_text(json.dumps({"versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
