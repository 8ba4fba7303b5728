"""Files that ask for more than they hold are refused within little memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux keeps them")
def test_bombs_are_refused_within_little_memory_and_time() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "bombs.py")],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == []
    assert found["files"] >= 40
