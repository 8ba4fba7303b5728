"""Runs a harness in a process of its own, since what it looks for would end the tests'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def counts(script: str, *arguments: str, seconds: float) -> dict[str, Any]:
    """What a script of this folder prints as JSON."""
    done = subprocess.run(
        [sys.executable, str(_HERE / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(_HERE.parent), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
