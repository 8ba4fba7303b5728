"""Whether an array may become a variable of another dtype, and whether its values are what weights can be.

Pure: NumPy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bad_values", "dtype_problem", "is_finite", "lossy_cast", "surely_finite"]

_PIECE = 8128  # values whose product with themselves OpenBLAS works out in one thread; many callers would wait for its others


def _is_float(dtype: np.dtype[Any]) -> bool:
    # The extension types of ml_dtypes (bfloat16, float8) have the kind "V" or "f", by version.
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


def dtype_problem(source: np.dtype[Any], target: np.dtype[Any]) -> str:
    """Why values of one dtype mustn't become another without being asked for; empty when they may."""
    if source == target or (_is_float(source) and _is_float(target) and source.kind != "c"):
        return ""
    if source.kind in "iu" and target.kind in "iu":
        return ""
    return f"{source.name} values for a {target.name} variable"


def lossy_cast(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether the change of dtype can lose digits or range."""
    if source == target:
        return False
    if _is_float(source) and _is_float(target):
        return not (source.itemsize < target.itemsize)
    return not np.can_cast(source, target, "safe")


def is_finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether no value is NaN or infinite."""
    if array.dtype == np.float32 and array.size > _PIECE and array.flags.c_contiguous and surely_finite(array.reshape(-1)):
        return True
    return not _is_float(array.dtype) or bool(np.isfinite(array).all())


def surely_finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether no value of an array of one axis is NaN or infinite for sure, in less time than it takes to look at each.

    The product of float32 values with themselves is finite only if every one of them is. Large finite values overflow it, so
    `False` says no more than that somebody should look again.
    """
    if array.dtype != np.float32:
        return is_finite(array)
    whole = array.size // _PIECE * _PIECE
    pieces, rest = array[:whole], array[whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        products = np.matmul(pieces.reshape(-1, 1, _PIECE), pieces.reshape(-1, _PIECE, 1))
        return bool(np.isfinite(products.sum() + np.dot(rest, rest)))


def bad_values(array: np.ndarray[Any, Any], dtype: np.dtype[Any], *, variable: str) -> str:
    """Why the values can't be the variable's; empty when they can.

    Args:
        array: The values as they would be loaded, before the change of dtype.
        dtype: The variable's dtype.
        variable: Its name within its layer.
    """
    if not is_finite(array):
        bad = ~np.isfinite(array)
        nan = int(np.isnan(array).sum())
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        return f"{int(bad.sum())} values aren't finite ({nan} NaN), the first at {first}"
    if array.dtype != dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(dtype)
        if _is_float(dtype) and not is_finite(cast):
            return f"values up to {float(np.abs(array.astype(np.float64)).max()):.3g} become infinite as {dtype.name}"
        if not _is_float(dtype) and not np.array_equal(cast, array):
            return f"values that {dtype.name} can't hold"
    if variable in ("moving_variance", "variance") and array.size and float(array.min()) < 0:
        return f"a variance below zero ({float(array.min()):.3g}): mean and variance may have changed places"
    return ""
