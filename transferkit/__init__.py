"""Transfer learning on `tf.keras`: build, load, fine-tune, evaluate.

The public names are loaded on first use, so that `import transferkit` costs milliseconds: TensorFlow comes with the first name
that needs it. `_HOMES` says which module each name lives in; the block under `TYPE_CHECKING` says the same to type checkers and
editors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from transferkit import errors

if TYPE_CHECKING:
    from transferkit.building.builder import ModelBuilder as ModelBuilder
    from transferkit.building.opening import OpenReport as OpenReport
    from transferkit.building.opening import explain_model as explain_model
    from transferkit.building.opening import open_model as open_model
    from transferkit.building.pca import PCA as PCA
    from transferkit.building.saving import save_model as save_model
    from transferkit.data import Data as Data
    from transferkit.evaluation.evaluator import Evaluator as Evaluator
    from transferkit.evaluation.report import Evaluation as Evaluation
    from transferkit.placement import Placement as Placement
    from transferkit.recipe import Recipe as Recipe
    from transferkit.selection.cross_validation import cross_validate as cross_validate
    from transferkit.selection.ranking import rank as rank
    from transferkit.tuning.averaging import greedy_soup as greedy_soup
    from transferkit.tuning.averaging import wise_ft as wise_ft
    from transferkit.tuning.epoch import same_kernels as same_kernels
    from transferkit.tuning.layers import Layers as Layers
    from transferkit.tuning.lr_finder import find_batch_size as find_batch_size
    from transferkit.tuning.lr_finder import find_learning_rate as find_learning_rate
    from transferkit.tuning.optimizers import with_multipliers as with_multipliers
    from transferkit.tuning.run import Run as Run
    from transferkit.tuning.schedules import Schedule as Schedule
    from transferkit.tuning.sharing import shared_features as shared_features
    from transferkit.tuning.throughput import find_bottleneck as find_bottleneck
    from transferkit.tuning.tuner import FineTuner as FineTuner
    from transferkit.weights.inspection import inspect_weights as inspect_weights
    from transferkit.weights.loader import WeightLoader as WeightLoader
    from transferkit.weights.readers.archive import Limits as Limits
    from transferkit.weights.readers.reading import open_archive as open_archive
    from transferkit.weights.report import LoadReport as LoadReport
    from transferkit.weights.saving import save_weights as save_weights
    from transferkit.weights.writing import convert_weights as convert_weights

__all__ = [
    "PCA",
    "Data",
    "Evaluation",
    "Evaluator",
    "FineTuner",
    "Layers",
    "Limits",
    "LoadReport",
    "ModelBuilder",
    "OpenReport",
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

__version__ = "0.1.0"

#: Public name → the module that defines it. A name here is also in `__all__` and in the block above.
_HOMES: Final[dict[str, str]] = {
    "Data": "transferkit.data",
    "Evaluation": "transferkit.evaluation.report",
    "Evaluator": "transferkit.evaluation.evaluator",
    "FineTuner": "transferkit.tuning.tuner",
    "Layers": "transferkit.tuning.layers",
    "Limits": "transferkit.weights.readers.archive",
    "LoadReport": "transferkit.weights.report",
    "ModelBuilder": "transferkit.building.builder",
    "OpenReport": "transferkit.building.opening",
    "PCA": "transferkit.building.pca",
    "Placement": "transferkit.placement",
    "Recipe": "transferkit.recipe",
    "Run": "transferkit.tuning.run",
    "Schedule": "transferkit.tuning.schedules",
    "WeightLoader": "transferkit.weights.loader",
    "convert_weights": "transferkit.weights.writing",
    "cross_validate": "transferkit.selection.cross_validation",
    "explain_model": "transferkit.building.opening",
    "find_batch_size": "transferkit.tuning.lr_finder",
    "find_bottleneck": "transferkit.tuning.throughput",
    "find_learning_rate": "transferkit.tuning.lr_finder",
    "greedy_soup": "transferkit.tuning.averaging",
    "inspect_weights": "transferkit.weights.inspection",
    "open_archive": "transferkit.weights.readers.reading",
    "open_model": "transferkit.building.opening",
    "rank": "transferkit.selection.ranking",
    "same_kernels": "transferkit.tuning.epoch",
    "save_model": "transferkit.building.saving",
    "save_weights": "transferkit.weights.saving",
    "shared_features": "transferkit.tuning.sharing",
    "wise_ft": "transferkit.tuning.averaging",
    "with_multipliers": "transferkit.tuning.optimizers",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        hint = errors.did_you_mean(name, __all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}", name=name, obj=None)
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
