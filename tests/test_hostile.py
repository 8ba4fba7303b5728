"""What hostile files come to, counted: a short run each time, the whole with `-m slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="reads at an offset as POSIX has them")


def run(*arguments: str, seconds: float) -> dict[str, Any]:
    """The harness's counts, from a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {part: counts["failed"] for part, counts in found.items()} == {part: [] for part in found}
    return found


def test_exploits_names_and_failing_loads_in_short() -> None:
    found = run("exploits", "names", "loads", "--every", "25", seconds=300)
    assert found["exploits"]["files"] >= 60
    assert found["names"]["files"] >= 60
    assert found["loads"]["failing"] == 40


@pytest.mark.slow
def test_every_name_and_a_thousand_failing_loads() -> None:
    found = run("names", "loads", seconds=3600)
    assert found["names"]["files"] == 5 * found["names"]["names"]
    assert found["loads"]["failing"] == 1000
