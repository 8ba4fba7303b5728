"""What a weights file holds, as text, HTML and JSON, from Python and from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import weights_files as files

from transferkit.__main__ import main
from transferkit.weights.inspection import inspect_weights

ROOT = Path(__file__).resolve().parent.parent

TABLE = """\
net.keras: keras, written by keras 3.15.1
layer   class               variable         shape  dtype    parameters
──────  ──────────────────  ───────────────  ─────  ───────  ──────────
first   Dense               kernel           5 × 7  float32          35
                            bias             7      float32           7
norm    BatchNormalization  gamma            7      float32           7
                            beta             7      float32           7
                            moving_mean      7      float32           7
                            moving_variance  7      float32           7
second  Dense               kernel           7 × 3  float32          21
                            bias             3      float32           3
8 arrays, 94 parameters, 376 B
the model's configuration is in the file
date_saved: 2025-01-01@00:00:00"""


def test_the_table(tmp_path: Path) -> None:
    contents = inspect_weights(files.keras(tmp_path)[0])
    assert str(contents) == TABLE
    assert '<td style="text-align:left">moving_mean</td>' in contents._repr_html_()


def test_to_dict_fits_into_json(tmp_path: Path) -> None:
    contents = inspect_weights(files.legacy_h5(tmp_path)[0])
    said = json.loads(json.dumps(contents.to_dict()))
    assert said["format"] == "legacy_h5"
    assert said["parameters"] == 94
    assert said["arrays"][0] == {
        "name": "first/kernel",
        "layer": "first",
        "class": "Dense",
        "variable": "kernel",
        "shape": [5, 7],
        "dtype": "float32",
    }


def test_a_check_counts_what_is_not_finite(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", good=np.ones(3), bad=np.array([1, np.nan, np.inf]), whole=np.arange(3))
    contents = inspect_weights(tmp_path / "a.npz", check=True)
    assert contents.not_finite == (("bad", 2),)
    assert str(contents).endswith("every array was read; 1 of them hold NaN or infinity")
    assert "float64, 2 not finite" in str(contents)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(files.keras(tmp_path)[0])
    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out == TABLE + "\n"
    assert main(["inspect", path, "--json", "--check"]) == 0
    assert json.loads(capsys.readouterr().out)["not_finite"] == {}
    assert main(["inspect", str(tmp_path / "none.h5")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"Reading weights from '{tmp_path}/none.h5'.\n  found: no file at that path\n")
    np.savez(tmp_path / "nan.npz", x=np.array([np.nan]))
    assert main(["inspect", str(tmp_path / "nan.npz"), "--check"]) == 1


def test_tensorflow_is_not_imported(tmp_path: Path) -> None:
    paths = [str(write(tmp_path)[0]) for write in files.WRITERS.values()]
    program = (
        "import sys\n"
        "from transferkit.__main__ import main\n"
        "codes = [main(['inspect', path, '--check']) for path in sys.argv[1:]]\n"
        "print(codes, sorted({'tensorflow', 'keras', 'h5py', 'torch', 'pickle'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # NumPy itself imports pickle; no reader uses it.
    assert done.stderr == f"{[0] * len(paths)} ['pickle']\n"
