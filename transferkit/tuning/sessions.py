"""The folder of a run, held for one call of `fit`: what was kept there is found, and nobody else writes there meanwhile.

May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from transferkit import storage
from transferkit._keras import tf
from transferkit.errors import PlanError, StorageError
from transferkit.tuning.checkpoint import Checkpoint, CheckpointFolder
from transferkit.tuning.resuming import Session
from transferkit.tuning.signals import Signals

__all__ = ["session", "stored_seed"]


@contextlib.contextmanager
def session(
    folder: str | os.PathLike[str] | None, *, resume: bool, save_every: int | float | None, keep: int, writes: bool = True
) -> Iterator[Session]:
    """What watches over one call of `fit`, and holds its folder for it.

    Args:
        folder: Where checkpoints go; None for none.
        resume: Whether to go on from what is there.
        save_every: A whole number of steps, or a float of seconds; None for as often as is cheap.
        keep: How many checkpoints are kept.
        writes: Whether this process writes them; of several workers one does, and the others only read where to go on.

    Raises:
        PlanError: for arguments that mean nothing.
        StorageError: for a folder that another run holds, that holds a run and isn't to be resumed, or can't be read.
    """
    problems = []
    if save_every is not None and (isinstance(save_every, bool) or not isinstance(save_every, (int, float)) or save_every <= 0):
        problems.append(f"save_every={save_every!r}; it must be a whole number of steps, or seconds with a point: 30.0")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        problems.append(f"keep_checkpoints={keep!r}; it must be a whole number above 0")
    if folder is None and (resume or save_every is not None):
        problems.append(f"{'resume' if resume else 'save_every'} without a checkpoint_dir")
    if problems:
        raise PlanError("Keeping checkpoints of a run.", found=problems, fix='fit(…, checkpoint_dir="runs/a", resume=True)')
    if folder is None:
        yield Session(None, None, None, Signals(""))
        return
    path = Path(folder).expanduser()
    if not writes:
        path.mkdir(parents=True, exist_ok=True)
        found = _begun(CheckpointFolder(path, keep=keep), resume=resume)
        with Signals(str(path), follows=True) as signals:
            try:
                yield Session(None, found, None, signals)
            except tf.errors.OpError:
                if signals.received is None:
                    raise
                signals.stop("the chief's last checkpoint")  # the chief has left, for whom the step waited
        return
    with storage.lock(path):
        checkpoints = CheckpointFolder(path, keep=keep)
        found = _begun(checkpoints, resume=resume)
        with Signals(str(path)) as signals:
            watch = Session(checkpoints, found, save_every, signals)
            try:
                yield watch
            finally:
                checkpoints.close()


def _begun(checkpoints: CheckpointFolder, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None where there is none.

    Raises:
        StorageError: where there is one, and it isn't to be gone on with.
    """
    found = checkpoints.newest()
    if found is not None and not resume:
        raise StorageError(
            f"Training with checkpoints in {str(checkpoints.path)!r}.",
            found=f"a run that is {'finished' if 'finished' in found.state else 'under way'} there",
            fix="resume=True goes on with it; for another run, name another folder",
        )
    return found


def stored_seed(folder: str | os.PathLike[str] | None, *, resume: bool) -> int | None:
    """The seed of the run in a folder, where there is one and it is to be gone on with."""
    if folder is None or not resume or not Path(folder).expanduser().is_dir():
        return None
    found = CheckpointFolder(Path(folder).expanduser(), keep=1).newest()
    return None if found is None else int(found.state["fingerprint"]["seed"])
