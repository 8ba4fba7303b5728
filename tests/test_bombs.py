"""Files that ask for more than they hold are refused within little memory and time."""

from __future__ import annotations

import sys

import pytest
from harness import counts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux keeps them")
def test_bombs_are_refused_within_little_memory_and_time() -> None:
    found = counts("bombs.py", seconds=600)
    assert found["failed"] == []
    assert found["files"] >= 40
