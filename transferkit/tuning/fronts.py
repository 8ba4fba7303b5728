"""What the front of a model gives for all rows: computed as a training on features computes it, and shared with that.

May import Keras and the floors below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transferkit.building.frontier import split
from transferkit.building.heads import leaf_layers
from transferkit.data import batches
from transferkit.tuning.sharing import features_of

__all__ = ["outputs_of"]


def outputs_of(front: Any, data: Any, *, batch_size: int = 32) -> np.ndarray[Any, Any]:
    """The outputs (n, …) of a model that doesn't train, in inference mode.

    Args:
        front: A functional model of one output.
        data: Whatever `fit` takes; rows of a whole that several runs share are computed once for all.
        batch_size: Rows at a time where nothing is shared.
    """
    made = split(front, frozen=[layer for _, layer in leaf_layers(front)])
    if not made:
        return np.concatenate([np.asarray(front.predict_on_batch(batch.x)) for batch in batches(data, batch_size=batch_size)])
    features = features_of(made.prefix, data)
    places = features.index(np.arange(features.rows), epoch=0)
    found = []
    for start in range(0, len(places), batch_size):
        parts = [array[places[start : start + batch_size]] for array in features.arrays]
        found.append(np.asarray(made.suffix(parts[0] if len(parts) == 1 else parts, training=False)))
    return np.concatenate(found)
