"""The Python code of README.md and docs/*.md, run as a reader would: top to bottom, one namespace per page, in an empty folder.

A block fenced as `output` right after a Python block is what that block prints, to the letter (`...` stands for anything).
A block that can't be run here has a comment before it that says why: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import linecache
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+) *(?P<kind>\w+)?.*$")
NOT_RUN = re.compile(r"^\s*<!-- not run: \S.*-->\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    kind: str
    line: int  # of the first line of its content, from 1
    text: str
    skipped: bool


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown page, in order."""
    lines = page.splitlines()
    index, last = 0, ""  # `last`: the last line with something on it
    while index < len(lines):
        opening = FENCE.match(lines[index])
        if opening is None:
            last = lines[index] if lines[index].strip() else last
            index += 1
            continue
        start = index + 1
        closing = opening["indent"] + opening["fence"]
        index = next((i for i in range(start, len(lines)) if lines[i].rstrip() == closing), len(lines))
        text = textwrap.dedent("\n".join(lines[start:index])) + "\n"
        yield Block(opening["kind"] or "", start + 1, text, NOT_RUN.match(last) is not None)
        index, last = index + 1, ""


def run_page(path: Path) -> None:
    """Runs a page's blocks.

    Raises:
        AssertionError: with the line of the page and what went wrong.
    """
    name, namespace = path.name, {"__name__": "__main__"}
    text = path.read_text(encoding="utf-8")
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # so tracebacks show the page's own lines
    printed: str | None = None
    for block in blocks(text):
        if block.kind == "output" and not block.skipped:
            if printed is None:
                raise AssertionError(f"{name}:{block.line}: an output block without a Python block that ran before it")
            if not doctest.OutputChecker().check_output(block.text, printed, doctest.ELLIPSIS):
                raise AssertionError(f"{name}:{block.line}: the page shows\n{block.text}\nbut the code prints\n{printed}")
        printed = None
        if block.kind != "python" or block.skipped:
            continue
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
        except BaseException as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
            where = "".join(traceback.format_list(frames[:1] + frames[1:][-2:]))
            what = "".join(traceback.format_exception_only(error))
            raise AssertionError(f"{name}:{block.line}: the block fails\n{where}{what}") from None
        printed = output.getvalue()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_on_the_page_runs(path: Path) -> None:
    run_page(path)


def test_blocks_are_found_with_their_lines(tmp_path: Path) -> None:
    page = (
        "# A\n\n```python\nx = 1\n```\n\n<!-- not run: why -->\n\n```python\n1/0\n```\n"
        "- item\n  ```python\n  print(x)\n  ```\n```output\n1\n```\n"
    )
    assert list(blocks(page)) == [
        Block("python", 4, "x = 1\n", False),
        Block("python", 10, "1/0\n", True),
        Block("python", 14, "print(x)\n", False),
        Block("output", 17, "1\n", False),
    ]
    (tmp_path / "page.md").write_text(page)
    run_page(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            "text\n```python\nx = 1\ny = x / 0\n```\n",
            'page.md:3: the block fails\n  File "page.md", line 4, in <module>\n    y = x / 0\n',
        ),
        ("```python\nprint(1)\n```\n```output\n2\n```\n", "page.md:5: the page shows\n2\n\nbut the code prints\n1\n"),
        ("```output\n2\n```\n", "page.md:2: an output block without a Python block that ran before it"),
    ],
)
def test_a_page_that_is_wrong_is_told_by_line(tmp_path: Path, page: str, message: str) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError) as caught:
        run_page(tmp_path / "page.md")
    assert str(caught.value).startswith(message)
