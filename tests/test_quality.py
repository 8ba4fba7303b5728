"""The checks that aren't tests: format, lint, types and the documentation site, each the command CONTRIBUTING.md gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What is run → its command, from the root of the checkout. The same as in .pre-commit-config.yaml.
CHECKS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "docs": ["mkdocs", "build", "--strict", "--quiet"],
}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs one of the tools of this Python's environment, without a terminal."""
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


#: Each Python gets another NumPy, whose types differ: what is right by those of 2.4 is wrong by those of 2.2 and 2.5.
OTHER_TYPES = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="types are checked on Python 3.11, by NumPy 2.4's")


@pytest.mark.parametrize("name", [pytest.param(name, marks=OTHER_TYPES if name == "types" else ()) for name in CHECKS])
def test_check(name: str, tmp_path: Path) -> None:
    command = CHECKS[name] + (["--site-dir", str(tmp_path / "site")] if name == "docs" else [])
    done = run(command)
    assert done.returncode == 0, f"`{' '.join(CHECKS[name])}` says:\n{done.stdout}{done.stderr}"


def test_pre_commit_runs_the_same_commands() -> None:
    hooks = re.findall(r"^\s+entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(hooks) == sorted(" ".join(command) for name, command in CHECKS.items() if name != "docs")


def test_the_readme_has_the_two_commands() -> None:
    """`.ci/run` takes the second one from the README, so there must be exactly one of each."""
    lines = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.split("/")[-1] for line in lines] == ["python -m transferkit.demo", "python -m pytest"]
