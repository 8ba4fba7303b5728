"""Mixup and CutMix: pairs of rows of a batch blended, their labels with them.

Zhang et al., ICLR 2018 (mixup), one λ ~ Beta(α, α) for each batch, as in the authors' code; Yun et al., ICCV 2019 (CutMix), the
box of their equation 2 and its labels in proportion to the pixels that really changed. What happens to a batch follows from
(seed, epoch, batch) alone, so a resumed run mixes as one that was never stopped.

May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.data import is_arrays
from transferkit.errors import DataError

__all__ = ["mix_batch", "mixed", "one_hot_labels"]

KINDS = ("mixup", "cutmix")


def _seed(seed: int, epoch: Any, batch: Any) -> Any:
    """The pair of numbers that TensorFlow's stateless functions take."""
    pair = tf.constant([seed & 0x7FFFFFFF, seed >> 31], tf.int32)
    for number in (epoch, batch):
        pair = tf.random.experimental.stateless_fold_in(pair, tf.cast(number, tf.int32))
    return pair


def _beta(alpha: float, seed: Any) -> Any:
    """One draw from Beta(α, α), as the share of the first of two Gamma(α) draws."""
    draws = tf.random.stateless_gamma((2,), seed, alpha=alpha)
    total = tf.reduce_sum(draws)
    # For small α both draws can underflow; the distribution is then all but on 0 and 1.
    return tf.where(total > 0, draws[0] / tf.where(total > 0, total, 1.0), 1.0)


def mix_batch(parts: tuple[Any, ...], *, kind: str, alpha: float, seed: int, epoch: Any, batch: Any) -> tuple[Any, ...]:
    """One batch, mixed.

    Args:
        parts: `(x, y)` or `(x, y, sample_weight)`: inputs of floating point, for CutMix images `(rows, height, width, channels)`;
            labels as probabilities or numbers, `(rows, ...)`; nested structures too.
        kind: `mixup` or `cutmix`.
        alpha: Of the Beta distribution, above 0.
        seed: Of the run.
        epoch: Number of the epoch.
        batch: Number of the batch.

    Returns:
        The same parts. Sample weights are blended like the labels.
    """
    pair = _seed(seed, epoch, batch)
    x = tf.nest.map_structure(tf.convert_to_tensor, parts[0])
    rest = tf.nest.map_structure(tf.convert_to_tensor, tuple(parts[1:]))
    leaves = tf.nest.flatten(x)
    _check_inputs(leaves, kind)
    share = _beta(alpha, pair)
    rows = tf.shape(leaves[0])[0]
    partner = tf.random.experimental.stateless_shuffle(tf.range(rows), tf.random.experimental.stateless_fold_in(pair, 1))
    if kind == "cutmix":
        place = tf.random.stateless_uniform((2,), tf.random.experimental.stateless_fold_in(pair, 2))
        boxes = [_box(leaf, share, place) for leaf in leaves]
        pasted = [tf.where(box, tf.gather(leaf, partner), leaf) for leaf, box in zip(leaves, boxes, strict=True)]
        x = tf.nest.pack_sequence_as(x, pasted)
        share = 1.0 - tf.reduce_mean(tf.cast(boxes[0], tf.float32))
    else:
        x = tf.nest.map_structure(lambda leaf: _blend(leaf, partner, share), x)
    return (x, *tf.nest.map_structure(lambda leaf: _blend(leaf, partner, share), rest))


def _blend(leaf: Any, partner: Any, share: Any) -> Any:
    kind = leaf.dtype if leaf.dtype.is_floating else tf.float32
    leaf = tf.cast(leaf, kind)
    share = tf.cast(share, kind)
    return share * leaf + (1 - share) * tf.gather(leaf, partner)


def _box(images: Any, share: Any, place: Any) -> Any:
    """True within a box of about `1 - share` of the image around `place`, clipped to the image: `(1, height, width, 1)`."""
    masks = []
    for axis, centre in ((1, place[0]), (2, place[1])):
        size = tf.cast(tf.shape(images)[axis], tf.float32)
        half = tf.floor(size * tf.sqrt(1 - share)) / 2
        middle = tf.floor(centre * size)
        pixels = tf.range(size)
        masks.append((pixels >= tf.floor(middle - half)) & (pixels < tf.floor(middle + half)))
    return (masks[0][:, None] & masks[1][None, :])[None, :, :, None]


def _check_inputs(leaves: list[Any], kind: str) -> None:
    problems = [f"inputs of type {leaf.dtype.name}, which can't be blended" for leaf in leaves if not leaf.dtype.is_floating]
    if kind == "cutmix":
        problems = [
            f"inputs of shape {tuple(leaf.shape)}; images have (rows, height, width, channels)"
            for leaf in leaves
            if leaf.shape.rank != 4
        ]
    if problems:
        raise DataError(
            f"Mixing batches by {kind}.",
            found=problems,
            cause="mixup blends numbers, CutMix pastes parts of images; token numbers and categories are neither",
            fix="leave it out of the plan, or give float inputs",
        )


def one_hot_labels(data: Any, classes: int) -> Any:
    """The data with whole-number labels as one-hot rows, float32.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, a `tf.data.Dataset`, a `PyDataset` or an iterable of batches.
        classes: How many classes there are.
    """

    def transform(parts: tuple[Any, ...], epoch: Any, batch: Any) -> tuple[Any, ...]:
        del epoch, batch
        labels = tf.convert_to_tensor(parts[1])
        if labels.shape.rank == 2:  # a column of labels, which Keras takes as well
            labels = tf.squeeze(labels, axis=-1)
        return (parts[0], tf.one_hot(tf.cast(labels, tf.int32), classes), *parts[2:])

    if is_arrays(data):
        return transform(tuple(data), 0, 0)
    return transformed(data, transform, epoch=lambda: 0)


def mixed(
    data: Any,
    *,
    kind: str,
    alpha: float,
    seed: int,
    epoch: Callable[[], int],
    start: Callable[[], int] = lambda: 0,
    steps: int | None = None,
) -> Any:
    """The batches of `data`, mixed, in the same order.

    Args:
        data: A `tf.data.Dataset`, a `PyDataset` or an iterable of batches `(x, y)` or `(x, y, sample_weight)`.
        kind: `mixup` or `cutmix`.
        alpha: Of the Beta distribution.
        seed: Of the run.
        epoch: Gives the number of the epoch, asked at the start of each pass.
        start: Gives the number of the pass's first batch, for a `tf.data.Dataset` that begins within an epoch.
        steps: Batches in an epoch, for a `tf.data.Dataset` that may go on into the next.
    """

    def transform(parts: tuple[Any, ...], number: Any, batch: Any) -> tuple[Any, ...]:
        return mix_batch(parts, kind=kind, alpha=alpha, seed=seed, epoch=number, batch=batch)

    return transformed(data, transform, epoch=epoch, start=start, steps=steps)


Transform = Callable[[tuple[Any, ...], Any, Any], tuple[Any, ...]]


def transformed(
    data: Any,
    transform: Transform,
    *,
    epoch: Callable[[], int],
    start: Callable[[], int] = lambda: 0,
    steps: int | None = None,
) -> Any:
    """`data` with each batch passed through `transform(parts, epoch, batch number)`."""
    if isinstance(data, tf.data.Dataset):
        numbers = tf.data.Dataset.from_generator(
            lambda: iter([(epoch(), start())]), output_signature=(tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.int64))
        )

        def numbered(number: Any, first: Any) -> Any:
            def change(batch: Any, *parts: Any) -> Any:
                epochs, place = (0, batch) if steps is None else (batch // steps, batch % steps)
                return transform(_parts(parts), number + epochs, place)

            return data.enumerate(first).map(change, tf.data.AUTOTUNE)

        whole = numbers.flat_map(numbered)
        size = int(data.cardinality())
        if size >= 0:
            whole = whole.apply(tf.data.experimental.assert_cardinality(size))
        return whole.with_options(data.options())  # how it is shared among replicas isn't seen through `flat_map`
    if isinstance(data, keras.utils.PyDataset):
        return _Transformed(data, transform, epoch)
    return _Batches(data, transform, epoch)


def _parts(element: tuple[Any, ...]) -> tuple[Any, ...]:
    """`enumerate` gives a batch as one argument when it is a tuple itself."""
    return element[0] if len(element) == 1 and isinstance(element[0], tuple) else element


def _arrays(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tf.nest.map_structure(np.asarray, parts)  # type: ignore[no-any-return]


class _Transformed(keras.utils.PyDataset):
    """A `PyDataset` whose batches are transformed, each by its own number, whatever order Keras takes them in."""

    def __init__(self, data: Any, transform: Transform, epoch: Callable[[], int]) -> None:
        super().__init__(workers=data.workers, use_multiprocessing=False, max_queue_size=data.max_queue_size)
        self._data, self._transform, self._epoch = data, transform, epoch

    @property
    def num_batches(self) -> Any:
        return self._data.num_batches

    def __len__(self) -> int:
        return int(self._data.num_batches)

    def __getitem__(self, index: int) -> Any:
        return _arrays(self._transform(self._data[index], self._epoch(), index))

    def on_epoch_begin(self) -> None:
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._data.on_epoch_end()


class _Batches:
    """An iterable of batches, transformed as they come."""

    def __init__(self, data: Any, transform: Transform, epoch: Callable[[], int]) -> None:
        self._data, self._transform, self._epoch = data, transform, epoch

    def __iter__(self) -> Iterator[Any]:
        number = self._epoch()
        for batch, parts in enumerate(self._data):
            yield _arrays(self._transform(parts, number, batch))
