"""The fuzz harness: a short run of every format, and two thousand mutations of each when asked for with `-m slow`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import weights_files as files
from harness import counts


def check(found: dict[str, Any], count: int) -> None:
    assert {result["format"]: result["failed"] for result in found["results"]} == {name: [] for name in files.WRITERS}
    assert found["foreign"] == []
    for result in found["results"]:
        assert result.get("refused", 0) > count // 10, f"the damage to {result['format']} files is too weak to find anything"


@pytest.mark.skipif(os.name != "posix", reason="alarms and limits as POSIX has them")
def test_a_few_mutations_of_every_format() -> None:
    check(counts("fuzz_weights.py", "--count", "40", seconds=120), 40)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="alarms and limits as POSIX has them")
def test_two_thousand_mutations_of_every_format() -> None:
    check(counts("fuzz_weights.py", "--count", "2000", "--strict", seconds=3600), 2000)
