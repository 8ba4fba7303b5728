"""The examples in the package's docstrings, run in an empty folder, each from the same seed; and that public names have one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import pkgutil
import sys
from pathlib import Path

import pytest

import transferkit

#: `__main__` modules run when they are imported.
MODULES = [
    "transferkit",
    *sorted(m.name for m in pkgutil.walk_packages(transferkit.__path__, "transferkit.") if not m.name.endswith("__main__")),
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def start_afresh() -> None:
    """Seeds Keras and drops its session: layer names and weights don't depend on the examples before."""
    keras = sys.modules.get("keras")
    if keras is not None:
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    failures = []
    for number, example in enumerate(test for test in doctest.DocTestFinder().find(module) if test.examples):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        start_afresh()
        said = io.StringIO()
        doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.write, clear_globs=True)
        if said.getvalue():
            failures.append(said.getvalue())
    assert not failures, "\n" + "\n".join(failures)


#: Results, which only verbs make: the verb's own example shows them.
RESULTS = {"Evaluation", "LoadReport", "OpenReport", "Run"}


@pytest.mark.parametrize("name", sorted(transferkit._HOMES))
def test_public_names_are_described_with_an_example(name: str) -> None:
    value = getattr(transferkit, name)
    text = inspect.getdoc(value) or ""
    assert text, f"transferkit.{name} has no docstring"
    assert ">>> " in text or name in RESULTS, f"the docstring of transferkit.{name} has no example"
