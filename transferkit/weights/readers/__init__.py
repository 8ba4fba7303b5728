"""Every weights format behind one face: `open_archive` gives an `Archive`."""

from transferkit.weights.readers.archive import Archive, ArrayInfo, LayerInfo, Limits
from transferkit.weights.readers.reading import open_archive

__all__ = ["Archive", "ArrayInfo", "LayerInfo", "Limits", "open_archive"]
