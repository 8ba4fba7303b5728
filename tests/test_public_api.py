"""What `import transferkit` offers, and what it costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import transferkit

#: The public names. Adding one is a promise to keep it: write it here, in `transferkit/__init__.py` and in docs/api.md.
PUBLIC = [
    "Data",
    "Evaluation",
    "Evaluator",
    "FineTuner",
    "Layers",
    "Limits",
    "LoadReport",
    "ModelBuilder",
    "OpenReport",
    "PCA",
    "Placement",
    "Recipe",
    "Run",
    "Schedule",
    "WeightLoader",
    "__version__",
    "convert_weights",
    "cross_validate",
    "errors",
    "explain_model",
    "find_batch_size",
    "find_bottleneck",
    "find_learning_rate",
    "greedy_soup",
    "inspect_weights",
    "open_archive",
    "open_model",
    "rank",
    "same_kernels",
    "save_model",
    "save_weights",
    "shared_features",
    "wise_ft",
    "with_multipliers",
]


def test_public_names_are_the_ones_promised() -> None:
    assert sorted(transferkit.__all__) == sorted(PUBLIC)


def test_every_name_but_the_eager_ones_has_a_home() -> None:
    assert sorted(transferkit._HOMES) == sorted(set(transferkit.__all__) - {"__version__", "errors"})


def test_type_checkers_are_told_the_same_homes() -> None:
    source = Path(transferkit.__file__).read_text(encoding="utf-8")
    block = next(n for n in ast.parse(source).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    told = {a.asname or a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert told == transferkit._HOMES


@pytest.mark.parametrize("name", transferkit._HOMES)
def test_names_are_their_homes_own(name: str) -> None:
    value = getattr(transferkit, name)
    assert value is getattr(importlib.import_module(transferkit._HOMES[name]), name)
    assert name in importlib.import_module(transferkit._HOMES[name]).__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_listed_by_dir(name: str) -> None:
    assert name in dir(transferkit)


def test_an_unknown_name_is_an_attribute_error_with_near_names() -> None:
    with pytest.raises(AttributeError) as caught:
        transferkit.error  # noqa: B018
    assert str(caught.value) == "module 'transferkit' has no attribute 'error' (did you mean 'errors'?)"
    assert not hasattr(transferkit, "quite_another_thing")


def test_importing_loads_nothing_heavy() -> None:
    """In a process of its own: modules loaded by `import transferkit` beyond the interpreter's, heavy ones by name."""
    heavy = {"tensorflow", "keras", "numpy", "h5py", "matplotlib", "jax", "torch"}
    code = "import sys, transferkit; dir(transferkit); print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "transferkit" in done.stdout.split()
    assert heavy & set(done.stdout.split()) == set()
