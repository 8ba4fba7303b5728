"""Whatever happens while a file is saved, the old one or the new one is there, whole; a process that lives on says what happened.

The short runs take a few faults of each sort; the slow ones 500 kills, a fault at every call that changes a file and fifty
offsets at which the disk is full, for each kind of file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import crashing
import pytest
from crashing import Kind, Saved, Tally
from kinds_of_files import kinds

from transferkit import errors

KINDS = kinds()
IDS = [kind.name for kind in KINDS]
SHORT = [kind for kind in KINDS if kind.name in ("save_weights .weights.h5", "save_weights .safetensors", "save_model .keras")]
FAULTS = ("killed", "fails", "full")

pytestmark = pytest.mark.skipif(not crashing.CAN_FORK, reason="needs fork")
traces = pytest.mark.skipif(not crashing.CAN_TRACE, reason="needs ptrace of Linux on x86-64")


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: what is flushed hundreds of times must not wait for other processes' disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def saved(kind: Kind, folder: Path) -> Saved:
    return Saved(kind, folder / "files", told=(errors.TransferKitError,))


def nothing_lost(tally: Tally, over: Saved, faults: int) -> None:
    assert tally.lost == []
    assert tally.untold == []
    assert tally.littered == []
    assert tally.faults >= faults
    assert over.is_clean()


def traced(over: Saved, fault: str, *, every: int = 1) -> Tally:
    try:
        return crashing.at_each_call(over, fault, every=every)
    except crashing.TracingForbiddenError:
        pytest.skip("this system lets no process trace another")


@pytest.mark.parametrize("kind", SHORT, ids=[kind.name for kind in SHORT])
def test_kills_and_full_disks_lose_nothing(folder: Path, kind: Kind) -> None:
    over = saved(kind, folder)
    nothing_lost(crashing.killed_at_random(over, 8), over, 8)
    nothing_lost(crashing.full_at_offsets(over, 4), over, 4)


@traces
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_calls_to_the_system_loses_nothing(folder: Path, fault: str) -> None:
    over = saved(SHORT[0], folder)
    nothing_lost(traced(over, fault, every=5), over, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_500_kills_lose_nothing(folder: Path, kind: Kind) -> None:
    over = saved(kind, folder)
    nothing_lost(crashing.killed_at_random(over, 500), over, 500)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_full_disk_at_50_offsets_loses_nothing(folder: Path, kind: Kind) -> None:
    over = saved(kind, folder)
    nothing_lost(crashing.full_at_offsets(over, 50), over, 50)


@pytest.mark.slow
@traces
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_fault_at_every_call_to_the_system_loses_nothing(folder: Path, kind: Kind, fault: str) -> None:
    over = saved(kind, folder)
    nothing_lost(traced(over, fault), over, 10)


def test_the_harness_sees_what_is_lost(folder: Path) -> None:
    def careless(path: Path, version: int) -> None:
        with open(path, "w") as file:
            for _ in range(100):
                file.write(f"{version} " * 1000)

    def whole(path: Path) -> int:
        (version,) = set(path.read_text().split())
        assert len(path.read_text().split()) == 100_000
        return int(version)

    over = saved(Kind("careless", careless, whole, "a.txt"), folder)
    tally = crashing.full_at_offsets(over, 5)
    assert len(tally.lost) == 5
    assert len(tally.untold) == 5
    if crashing.CAN_TRACE:
        assert traced(over, "killed").lost
