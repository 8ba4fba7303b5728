"""What every test gets: quiet TensorFlow, pictures without a screen, a seed, a clean Keras session."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Read by TensorFlow and matplotlib when they are first imported, so set before any test file is.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # the suite compares bits, which a GPU doesn't keep

import numpy as np
import pytest

SEED = 20_240_501


@functools.cache
def _keep_out_of_collections() -> None:
    """Takes what the imports made out of the garbage collector's sight.

    `clear_session` collects, and going over TensorFlow's own objects after every test is a third of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    """Seeds what is random, and drops what the test left in Keras (layer names are counted per session)."""
    random.seed(SEED)
    np.random.seed(SEED)  # scikit-learn and plain Keras data sets draw from the global generator
    keras = sys.modules.get("keras")
    if keras is not None:
        _keep_out_of_collections()
        keras.utils.set_random_seed(SEED)
    yield
    keras = sys.modules.get("keras")
    if keras is not None:
        keras.utils.clear_session()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and images, or a skip: `$TRANSFERKIT_DATA`, else `shared/data` beside the checkout."""
    named = os.environ.get("TRANSFERKIT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of real data at {folder} (set TRANSFERKIT_DATA)")
    return folder
