"""What hostile files come to, counted: a short run each time, the whole with `-m slow`."""

from __future__ import annotations

import os
from typing import Any

import pytest
from harness import counts

pytestmark = pytest.mark.skipif(os.name != "posix", reason="reads at an offset as POSIX has them")


def run(*arguments: str, seconds: float) -> dict[str, Any]:
    """The harness's counts, where nothing failed."""
    found = counts("hostile.py", *arguments, seconds=seconds)
    assert {part: result["failed"] for part, result in found.items()} == {part: [] for part in found}
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
