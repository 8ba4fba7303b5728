"""Principal components as a layer: features turned into the few directions along which the training rows differ most.

The directions are the right singular vectors of the centred rows (Jolliffe, Principal Component Analysis, 2002, section 3.5),
scaled to unit variance where whitening is asked for. Rows are folded in piece by piece: of all that came so far a triangular
factor with the same singular values is kept, and the mean is corrected by one more row (Ross, Lim, Lin and Yang, IJCV 2008,
equations 1 to 3, here without forgetting), so memory doesn't grow with the rows and nothing is approximated. Signs are as in
scikit-learn: the largest weight of each direction is positive. May import Keras.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from transferkit._keras import keras
from transferkit.errors import DataError, ModelError, PlanError

__all__ = ["PCA"]

#: Rows folded in at a time.
_PIECE = 4096


@final
@keras.saving.register_keras_serializable(package="transferkit")  # type: ignore[untyped-decorator, unused-ignore]
class PCA(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """Projects the last axis onto its principal components. It learns by `adapt`, never by gradients, and gives NaN before.

    Registered with Keras: `tk.open_model` opens a model that has one, and so does Keras once `tk.PCA` has been imported.

    Args:
        components: How many directions are kept: 1 up to the number of features.
        whiten: Whether each component is divided by its standard deviation over the rows adapted to. A component without any
            spread there is 0.
        options: Of any Keras layer: `name`, `dtype`.

    Raises:
        PlanError: when `components` isn't a whole number above 0.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).astype("float32")
        >>> pca = tk.PCA(3)
        >>> pca.adapt(rows)
        >>> pca(rows).shape
        TensorShape([100, 3])
    """

    def __init__(self, components: int, *, whiten: bool = False, **options: Any) -> None:
        if isinstance(components, bool) or not isinstance(components, (int, np.integer)) or components < 1:
            raise PlanError(
                "Making a PCA layer.", found=f"components={components!r}; it must be a whole number above 0", fix="PCA(32)"
            )
        super().__init__(**options)
        self.components = int(components)
        self.whiten = bool(whiten)

    def build(self, input_shape: Any) -> None:
        """Makes the variables for inputs of that shape."""
        features = input_shape[-1]
        if features is None or features < self.components:
            raise ModelError(
                f"Building the layer {self.name!r}, which keeps {self.components} components.",
                found=f"inputs of {'an unknown number of' if features is None else features} features",
                fix="fix the last axis of its input" if features is None else f"keep {features} components at most",
            )

        def variable(name: str, *shape: int, value: float) -> Any:
            start = keras.initializers.Constant(value)
            # Not cast with the layer: in half precision a small variance would be 0.
            return self.add_weight(name=name, shape=shape, initializer=start, trainable=False, dtype="float32", autocast=False)

        self.mean = variable("mean", features, value=0.0)
        # Not a number until it has learned something: a projection at random would look like a result.
        self.directions = variable("directions", features, self.components, value=float("nan"))
        self.variance = variable("variance", self.components, value=1.0)
        self.total_variance = variable("total_variance", value=1.0)
        self.built = True

    @property
    def is_adapted(self) -> bool:
        """Whether it has learned its directions."""
        return self.built and bool(np.isfinite(np.asarray(self.directions)).all())

    @property
    def explained(self) -> NDArray[np.float64]:
        """The share of the variance that each component has (components,), of the rows adapted to."""
        total = float(np.asarray(self.total_variance))
        return np.asarray(self.variance, dtype=np.float64) / (total or 1.0)

    def adapt(self, data: Any) -> None:
        """Learns the directions from rows, in place of what it had learned before.

        Args:
            data: Features (n, …, d), or batches of them: a list, a `tf.data.Dataset`. Axes before the last count as rows.

        Raises:
            DataError: for fewer rows than components, or values that aren't finite.
        """
        rows, mean, factor = _folded(data, asked=f"Adapting the layer {self.name!r}.")
        if rows <= self.components:
            raise DataError(
                f"Adapting the layer {self.name!r}, which keeps {self.components} components.",
                found=f"{rows} rows, which lie in at most {max(rows - 1, 0)} directions",
                fix="give more rows, or keep fewer components",
            )
        if not self.built:
            self.build((None, len(mean)))
        _, singular, directions = np.linalg.svd(factor, full_matrices=False)
        largest = np.abs(directions).argmax(axis=1)
        directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
        variance = singular**2 / (rows - 1)
        kept = self.components
        self.mean.assign(mean)
        self.directions.assign(directions[:kept].T)
        self.variance.assign(variance[:kept])
        self.total_variance.assign(variance.sum())

    def call(self, inputs: Any) -> Any:
        """The components of the inputs, in the layer's compute dtype."""
        ops = keras.ops
        values = ops.matmul(ops.cast(inputs, "float32") - self.mean, self.directions)
        if self.whiten:
            # What is left of a direction without spread is rounding, some 1e-7 of the whole, squared.
            spread = ops.sqrt(self.variance)
            flat = self.variance <= 1e-12 * self.total_variance
            values = ops.where(flat, 0.0, values / ops.where(flat, 1.0, spread))
        return ops.cast(values, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """The input's shape with `components` as its last axis."""
        return (*input_shape[:-1], self.components)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "components": self.components, "whiten": self.whiten}


def _pieces(data: Any) -> Iterator[NDArray[np.float64]]:
    """The rows in float64, a bounded number at a time."""
    parts: Iterable[Any] = [data] if hasattr(data, "shape") else data
    for part in parts:
        array = np.asarray(part)
        flat = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(0, 0)
        for start in range(0, len(flat), _PIECE):
            yield flat[start : start + _PIECE].astype(np.float64)


def _folded(data: Any, *, asked: str) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """How many rows there are, their mean, and a factor R with RᵀR = (X - mean)ᵀ(X - mean)."""
    rows, mean, factor = 0, np.zeros(0), np.zeros((0, 0))
    for piece in _pieces(data):
        if not np.isfinite(piece).all():
            raise DataError(
                asked, found="features that aren't finite", fix="look for NaN in the rows and in the layers before it"
            )
        own, middle = len(piece), piece.mean(axis=0)
        if not rows:
            mean, factor = middle, np.zeros((0, len(middle)))
        shift = np.sqrt(rows * own / (rows + own)) * (mean - middle)
        factor = np.asarray(np.linalg.qr(np.vstack([factor, piece - middle, shift[None]]), mode="r"))
        mean = mean + (middle - mean) * (own / (rows + own))
        rows += own
    if not rows:
        raise DataError(asked, found="no rows", fix="give at least a row more than there are components")
    return rows, mean, factor
