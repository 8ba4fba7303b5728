"""Running a frozen prefix over blocks of rows, in order, several at a time and at most a few ahead.

Blocks are all of one size, the last one filled up: kernels choose their way by the batch's size, and at a size of 1 the bits
differ (measured on convolutions by up to 8e-6). Two Python threads run the same compiled function, because TensorFlow's own
threads leave a small batch's cores idle. May import Keras and the floors below.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.constancy import nearly
from transferkit.building.graph_model import GraphModel
from transferkit.errors import ModelError
from transferkit.tuning.fingerprints import BLOCK

__all__ = ["Extraction", "RowsMixedError"]

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")


class RowsMixedError(ModelError):
    """The frozen part can't be computed row by row."""


def _mixed(found: str) -> RowsMixedError:
    return RowsMixedError(
        "Computing the frozen part of a model once for every row.",
        found=found,
        cause="a layer takes something over its whole batch, which in training is another in each epoch",
        fix=".cache(False), or a layer that treats each row for itself",
    )


class Extraction:
    """A prefix ready to run over blocks.

    Args:
        prefix: The frozen part.
        how: `exact`; `folded`, with the weights as constants of the graph and BatchNorms merged into the convolutions before
            them; `bfloat16`, with the weights as constants of layers that compute in bfloat16.
        views: How many times each row is computed; what is random in the prefix is drawn anew each time.
        seed: Of what is random.
        block: Rows in a block.
        batches: The sizes of batches in which training would compute the rows, as far as they are known.
    """

    def __init__(
        self,
        prefix: GraphModel,
        *,
        how: str = "exact",
        views: int = 1,
        seed: int = 0,
        block: int = BLOCK,
        batches: Collection[int] = (),
    ) -> None:
        self._prefix = prefix
        self._block, self._batches = block, tuple(batches)
        self._how = how
        self._views = views
        self._seed = seed
        #: The largest difference to `exact` on the first block, against the largest value.
        self.error = 0.0
        self._random = prefix.is_random()
        gpu = bool(tf.config.list_physical_devices("GPU"))
        # What is random draws from one state, and must draw in order; a GPU has threads of its own.
        self._threads = 1 if self._random or gpu else min(2, os.cpu_count() or 1)

    def run(
        self,
        blocks: Callable[[], Iterator[Any]],
        finish: Callable[[Any, list[Array]], Result],
        *,
        traced: Callable[[], Any] | None = None,
    ) -> Iterator[Result]:
        """What `finish` makes of each block and of what the prefix gives for it, in order, view after view.

        Args:
            blocks: Gives the blocks, once for each view.
            finish: Called in a thread with a block and the prefix's outputs for its rows.
            traced: Called once Python's part is done and what remains is computing.

        Raises:
            RowsMixedError: when code of the user's in the prefix makes more of a block than of its rows one by one.
        """
        function: Any = None

        def one(x: Any) -> Result:
            count = len(tf.nest.flatten(x)[0])
            padded = self._padded(x)
            return finish(x, [value.numpy()[:count] for value in tf.nest.flatten(function(padded))])

        with self._seeded(), ThreadPoolExecutor(self._threads, "transferkit-features") as pool:
            waiting: collections.deque[Future[Result]] = collections.deque()
            try:
                for x in itertools.chain.from_iterable(blocks() for _ in range(self._views)):
                    first = function is None
                    if first:  # traced here, by one thread
                        function = self._tried_out(x)
                        if traced is not None:
                            traced()
                    waiting.append(pool.submit(one, x))
                    if first:  # the first call settles on kernels; each of two at once would do so
                        waiting[0].result()
                    if len(waiting) > 2 * self._threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _tried_out(self, x: Any) -> Callable[[Any], Any]:
        """The computation for blocks like this one, once it has shown that it treats each row for itself."""
        try:
            function = self._function(x)
            self._try_company(function, self._padded(x))
        except RowsMixedError:
            raise
        except (tf.errors.OpError, ValueError, TypeError) as error:
            if not self._prefix.has_users_code():
                raise
            text = f"the frozen part can't be computed in blocks of {self._block} rows ({type(error).__name__})"
            raise _mixed(text) from error
        return function

    def _function(self, x: Any) -> Callable[[Any], Any]:
        some = self._padded(x)
        if self._how == "exact":
            function: Callable[[Any], Any] = self._prefix.as_function(some)
            return function
        with self._states_kept():
            exact = tf.nest.flatten(self._prefix.as_function()(some))
        quick: Callable[[Any], Any] = self._prefix.with_constants("mixed_bfloat16" if self._how == "bfloat16" else None)
        with self._states_kept():
            found = tf.nest.flatten(quick(some))
        for one, other in zip(exact, found, strict=True):
            if one.dtype.is_floating:
                largest = float(tf.reduce_max(tf.abs(one)))
                change = float(tf.reduce_max(tf.abs(other - one)))
                self.error = max(self.error, change / largest if largest else 0.0)
        return quick

    def _try_company(self, function: Callable[[Any], Any], x: Any) -> None:
        """Computes rows of a block beside others, and in batches like training's; of Keras's own layers it is known."""
        if self._random or not self._prefix.has_users_code():
            return
        block = self._block
        wanted = [value.numpy() for value in tf.nest.flatten(function(x))]

        def same(places: Array, kept: Array, within: float) -> bool:
            company = tf.nest.map_structure(lambda tensor: tf.gather(tensor, places), x)
            found = [value.numpy() for value in tf.nest.flatten(function(company))]
            return all(nearly(one[places[kept]], other[kept], within=within) for one, other in zip(wanted, found, strict=True))

        for first in (0, 1):
            kept = np.arange(first, block, 2)
            # A row keeps its place: kernels may treat the last rows of a block in a way of their own.
            places = np.full(block, first)
            places[kept] = kept
            if not same(places, kept, 1e-5):
                raise _mixed(f"what the frozen part gives for a row depends on the rows beside it, in a block of {block}")
        for size in self._batches:
            places = np.resize(np.arange(block)[::-1], -(-block // size) * size)
            # Another size of batch brings other rounding.
            if not all(same(some, np.arange(size), 1e-3) for some in places.reshape(-1, size)):
                raise _mixed(
                    f"what the frozen part gives for a row in a batch of {size} isn't what it gives in a block of {block}"
                )

    def _padded(self, x: Any) -> Any:
        def filled(array: Any) -> Any:
            array = np.asarray(array)
            missing = self._block - len(array)
            return tf.convert_to_tensor(array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]))

        return tf.nest.map_structure(filled, x)

    def _states(self) -> list[Any]:
        return [variable for variable in self._prefix.variables if variable.path.endswith("seed_generator_state")]

    @contextlib.contextmanager
    def _states_kept(self) -> Iterator[None]:
        before = [state.numpy() for state in self._states()]
        try:
            yield
        finally:
            for state, value in zip(self._states(), before, strict=True):
                state.assign(value)

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Draws from the seed, and leaves the random states of the model as they were: a resumed run finds the same views."""
        with self._states_kept():
            random = np.random.Generator(np.random.Philox(key=[self._seed, 2**61]))
            for state in self._states():
                number = int(random.integers(0, 2**31 - 1))
                state.assign(np.array([number, 0], dtype=keras.backend.standardize_dtype(state.dtype)))
            yield
