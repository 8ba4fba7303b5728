"""The floors of the house, as docs/architecture.md draws them: a file imports only from floors below its own.

A new file must be given its place in `FLOORS`. Files of one room (a folder that is a package) may import one another, files of
one floor may where the import makes no circle.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "transferkit"

#: Floor → the modules and rooms (packages, with all that is in them) on it.
FLOORS: dict[int, tuple[str, ...]] = {
    1: ("errors", "_table"),
    2: ("_plan", "storage", "_keras", "_objects", "class_names"),
    3: ("weights", "data", "images", "image_headers", "cluster", "meeting", "placement", "tasks"),
    4: ("building", "evaluation"),
    5: ("tuning",),
    6: ("recipe",),
    7: ("selection", "launching", "bundle", "doctor"),
    8: ("commands", "demo", "__main__", "__init__"),
}

#: Modules that know nothing of Keras: the standard library, NumPy, ml_dtypes and h5py, and modules as pure as they are.
PURE: tuple[str, ...] = (
    "errors",
    "_table",
    "_plan",
    "storage",
    "image_headers",
    "cluster",
    "launching",
    "meeting",
    "tasks",
    "weights.readers",
    "weights.mapping",
    "weights.matching",
    "weights.pairing",
    "weights.structure",
    "weights.units",
    "weights.names",
    "weights.composing",
    "weights.old_files",
    "weights.sources",
    "weights.torch_layouts",
    "weights.old_layouts",
    "weights.adapters",
    "building.old_names",
    "building.upgrading_layers",
    "building.upgrading",
    "building.allowed",
    "building.vetting",
    "evaluation.calibration",
    "evaluation.estimating",
    "evaluation.intervals",
    "evaluation.classification",
    "evaluation.means",
    "evaluation.metrics",
    "evaluation.regression",
    "evaluation.ranking",
    "evaluation.resampling",
    "evaluation.rows",
    "evaluation.comparing",
    "evaluation.folds",
    "evaluation.inspecting",
    "evaluation.slicing",
    "selection.scores",
    "tuning.figures",
)
PURE_PACKAGES = {"numpy", "h5py", "ml_dtypes", "typing_extensions"}

#: Packages that `pip install transferkit` brings (ml_dtypes comes with TensorFlow: the types that NumPy lacks, bfloat16 for one).
CORE_PACKAGES = {"tensorflow", "keras", "ml_dtypes", "numpy", "h5py", "typing_extensions"}
#: Packages that an extra brings: imported inside the function that needs them, nowhere else.
OPTIONAL_PACKAGES = {
    "IPython",
    "PIL",
    "matplotlib",
    "resource",  # in the standard library, but not on Windows
    "pandas",
    "safetensors",
    "sklearn",
    "tensorboard",
    "yaml",
}


@dataclass(frozen=True)
class Import:
    """One imported module: where, and whether inside a function or under TYPE_CHECKING."""

    name: str
    line: int
    inside_function: bool
    for_types_only: bool


def modules() -> dict[str, Path]:
    """Each module's name within the package, with dots, to its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


MODULES = modules()


def within(name: str, places: tuple[str, ...]) -> bool:
    """Whether the module is one of the places or in a room of that name."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def floor_of(name: str) -> int | None:
    return next((floor for floor, places in FLOORS.items() if within(name, places)), None)


def is_types_only(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def imports_of(path: Path) -> Iterator[Import]:
    """Every import statement of a file, those inside functions too; relative ones are refused where they are found."""

    def walk(node: ast.AST, inside_function: bool, for_types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside_function, for_types_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: a relative import; write the full name"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                is_module = full.removeprefix("transferkit.") in MODULES
                yield Import(full if is_module else module, node.lineno, inside_function, for_types_only)
        elif isinstance(node, ast.If) and is_types_only(node.test):
            for guarded in node.body:
                yield from walk(guarded, inside_function, True)
            for other in node.orelse:
                yield from walk(other, inside_function, for_types_only)
        else:
            deeper = inside_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, deeper, for_types_only)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False, False)


def own(name: str) -> str | None:
    """The module's name within the package when it is one of ours, else None."""
    if name == "transferkit":
        return "__init__"
    return name.removeprefix("transferkit.") if name.startswith("transferkit.") else None


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_every_file_has_a_floor() -> None:
    report(
        [
            f"{path.relative_to(ROOT)} has no floor: place {name!r} in FLOORS (tests/test_layers.py) and in docs/architecture.md"
            for name, path in MODULES.items()
            if floor_of(name) is None
        ]
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name: str) -> None:
    floor, room = floor_of(name), name.split(".")[0]
    if floor is None:
        pytest.fail(f"{name} has no floor")
    problems = []
    for imported in imports_of(MODULES[name]):
        target = own(imported.name)
        if target is None or (name == "__init__" and imported.for_types_only):
            continue
        where = f"{MODULES[name].relative_to(ROOT)}:{imported.line}"
        if target not in MODULES:
            problems.append(f"{where}: imports {imported.name}, which isn't there")
        elif target == "__init__" and floor < max(FLOORS):
            problems.append(f"{where}: imports the package's front door; import the module itself")
        elif target.split(".")[0] != room and (floor_of(target) or 0) > floor:
            problems.append(f"{where}: floor {floor} imports {target} from floor {floor_of(target)} above it")
    report(problems)


def test_no_imports_in_a_circle() -> None:
    graph = {
        name: {t for i in imports_of(path) if (t := own(i.name)) and not i.for_types_only and t != name}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", MODULES)
def test_packages_come_from_where_they_should(name: str) -> None:
    problems = []
    for imported in imports_of(MODULES[name]):
        package = imported.name.split(".")[0]
        where = f"{MODULES[name].relative_to(ROOT)}:{imported.line}"
        if imported.inside_function and package not in OPTIONAL_PACKAGES:
            problems.append(f"{where}: imports {imported.name} inside a function; only optional packages are imported there")
        if package in sys.stdlib_module_names or package in {"transferkit", "__future__"}:
            continue
        if package in OPTIONAL_PACKAGES:
            if not imported.inside_function and not imported.for_types_only:
                problems.append(
                    f"{where}: imports the optional package {package} when the module is loaded; import it where it is used"
                )
        elif package not in CORE_PACKAGES:
            problems.append(f"{where}: imports {package}, which is in neither CORE_PACKAGES nor OPTIONAL_PACKAGES")
        elif package in {"tensorflow", "keras"} and name != "_keras":
            problems.append(f"{where}: imports {imported.name}; write `from transferkit._keras import keras, tf`")
        if ".src" in f".{imported.name}":
            problems.append(f"{where}: imports the private {imported.name}")
    report(problems)


@pytest.mark.parametrize("name", [n for n in MODULES if within(n, PURE)])
def test_pure_files_know_nothing_of_keras(name: str) -> None:
    problems = []
    for imported in imports_of(MODULES[name]):
        if imported.for_types_only:
            continue
        where = f"{MODULES[name].relative_to(ROOT)}:{imported.line}"
        target, package = own(imported.name), imported.name.split(".")[0]
        if target is not None:
            if not within(target, PURE):
                problems.append(f"{where}: a pure file imports {target}, which isn't pure")
        elif package not in sys.stdlib_module_names and package not in PURE_PACKAGES | OPTIONAL_PACKAGES:
            problems.append(f"{where}: a pure file imports {imported.name}")
    report(problems)


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    """The walk itself finds imports wherever they hide."""
    sample = tmp_path / "sample.py"
    sample.write_text(
        "from __future__ import annotations\n"
        "import numpy as np, tensorflow\n"
        "from transferkit import errors\n"
        "from transferkit.errors import PlanError\n"
        "if TYPE_CHECKING:\n    import keras\nelse:\n    import h5py\n"
        "class A:\n    def f(self):\n        try:\n            import PIL.Image\n        except ImportError:\n            pass\n"
    )
    found = [(i.name, i.inside_function, i.for_types_only) for i in imports_of(sample)]
    assert found == [
        ("__future__", False, False),
        ("numpy", False, False),
        ("tensorflow", False, False),
        ("transferkit.errors", False, False),
        ("transferkit.errors", False, False),
        ("keras", False, True),
        ("h5py", False, False),
        ("PIL.Image", True, False),
    ]
