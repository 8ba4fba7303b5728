"""`Cluster`: the workers that train together, and which of them this process is; found in the environment.

What starts processes says so in variables: `TF_CONFIG` is TensorFlow's own and what `python -m transferkit launch` writes; `RANK`
and `MASTER_ADDR` are those of torchrun; `SLURM_*` those of Slurm's `srun` (its manual page lists them as output environment
variables, `slurm_hostlist_create(3)` defines lists of nodes). Nothing is connected to here: that is done by `meeting`. Imports
the standard library and `errors`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transferkit.errors import PlacementError, PlanError, did_you_mean

__all__ = ["Cluster", "find_cluster", "slurm_nodes", "split_address"]

#: More workers than this in one list are a slip of the pen ("node[1-1000000000]").
_MOST = 100_000
_SAME_HOST = ("localhost", "127.0.0.1", "[::1]")


def split_address(address: str) -> tuple[str, int]:
    """`host:port` in two, the host without the brackets that an IPv6 address has."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True)
class Cluster:
    """The workers that train together, and which of them this process is.

    Args:
        workers: `host:port` of each, the chief first. An empty host (`:2223`) is one that isn't known yet: `check_in` finds it.
        index: This process's place among them, counted from 0.

    Raises:
        PlanError: for addresses that are none or are there twice, and an index that no worker has.

    Example:
        >>> from transferkit.cluster import Cluster
        >>> print(Cluster(("10.0.0.1:2222", "10.0.0.2:2222"), index=1))
        worker 1 (10.0.0.2:2222) of 2, whose chief is 10.0.0.1:2222
    """

    workers: tuple[str, ...]
    index: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "workers", tuple(self.workers))
        if problems := _problems(self.workers, self.index):
            raise PlanError("Naming the workers of a cluster.", found=problems, fix='Cluster(("10.0.0.1:2222", …), index=0)')

    def __str__(self) -> str:
        return f"{self.name(self.index)} of {self.size}" + ("" if self.is_chief else f", whose chief is {self.workers[0]}")

    @property
    def size(self) -> int:
        """The number of workers."""
        return len(self.workers)

    @property
    def is_chief(self) -> bool:
        """Whether this process is worker 0, which writes the files and prints."""
        return self.index == 0

    @property
    def is_complete(self) -> bool:
        """Whether every worker's host is known."""
        return not any(worker.startswith(":") for worker in self.workers)

    def name(self, index: int) -> str:
        """Worker number `index` in the words of messages."""
        where = self.workers[index]
        return f"worker {index} ({'port ' + where[1:] if where.startswith(':') else where})"

    def tf_config(self) -> str:
        """The text for the variable `TF_CONFIG`.

        Raises:
            PlacementError: while a host isn't known.
        """
        if not self.is_complete:
            raise PlacementError(
                "Writing TF_CONFIG.",
                found=[f"the host of {self.name(i)} isn't known" for i, w in enumerate(self.workers) if w.startswith(":")],
                cause="RANK and MASTER_ADDR say where the chief is, and nothing of the others",
                fix="cluster = check_in(cluster), by which the workers learn each other's hosts",
            )
        return json.dumps({"cluster": {"worker": list(self.workers)}, "task": {"type": "worker", "index": self.index}})


def _problems(workers: Sequence[str], index: int) -> list[str]:
    """What is wrong with a list of addresses and a place in it."""
    found = [] if workers else ["no worker"]
    first: dict[str, int] = {}
    for place, worker in enumerate(workers):
        host, colon, port = worker.rpartition(":") if isinstance(worker, str) else ("", "", "")
        if not colon or re.search(r"[\s/,]", host) or (":" in host and not re.fullmatch(r"\[[0-9A-Fa-f:.%\w]+\]", host)):
            found.append(f"worker {place}: {worker!r} isn't host:port")
        elif not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            found.append(f"worker {place}: {worker!r} has the port {port!r}; ports are 1 to 65535")
        elif (before := first.setdefault(worker, place)) != place and host:
            found.append(f"workers {before} and {place} have the same address {worker!r}")
    if isinstance(index, bool) or not isinstance(index, int):
        found.append(f"the index {index!r}, which isn't a whole number")
    elif workers and not 0 <= index < len(workers):
        found.append(f"the index {index}; of {len(workers)} workers the last is number {len(workers) - 1}")
    return found


def find_cluster(environ: Mapping[str, str] = os.environ, *, port: int | None = None) -> Cluster | None:
    """The cluster that the environment describes, or None where it describes none.

    Looked at in this order, the nearest to the process first, for `srun torchrun …` leaves the variables of both:

    1. `TF_CONFIG`, with workers and perhaps a chief. It is what the launcher writes.
    2. `TRANSFERKIT_WORKERS` (`host:port,host:port,…`) and `TRANSFERKIT_INDEX`.
    3. `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`. Worker i has the port MASTER_PORT + 1 + i, for torchrun keeps
       MASTER_PORT for itself; the hosts of all but the chief are learnt by `check_in`.
    4. A step of Slurm (`srun`): `SLURM_PROCID`, `SLURM_STEP_NODELIST`, `SLURM_STEP_TASKS_PER_NODE`. A script that `sbatch` runs
       without `srun` is one process, and no cluster.

    Args:
        environ: The variables.
        port: Under Slurm, the port of the first worker on each node; those beside it have the next ones. None makes one of the
            numbers of job and step, in 15000–30999, so that two jobs on a node seldom meet.

    Raises:
        PlacementError: when what is there is contradictory, incomplete, or a role that takes no part in training.
    """
    if environ.get("TF_CONFIG", "").strip():
        return _of_tf_config(environ["TF_CONFIG"])
    if "TRANSFERKIT_WORKERS" in environ or "TRANSFERKIT_INDEX" in environ:
        return _of_own_variables(environ)
    if "RANK" in environ or ("WORLD_SIZE" in environ and "SLURM_STEP_NODELIST" not in environ):
        return _of_rank(environ)
    return _of_slurm(environ, port) if "SLURM_STEP_NODELIST" in environ else None


def _cluster(source: str, workers: Sequence[str], index: int | None, problems: list[str], fix: str) -> Cluster:
    """The cluster, or the error with all that was found."""
    if workers:  # where there are none, the reason is among the problems already
        problems = problems + _problems(workers, 0 if index is None else index)
    if problems or index is None:
        raise PlacementError(f"Finding the workers in {source}.", found=problems, fix=fix)
    return Cluster(tuple(workers), index)


def _number(text: Any) -> int | None:
    """A whole number that isn't negative, also as text, as the environment has it."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    return int(text) if isinstance(text, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", text) else None


def _read_numbers(environ: Mapping[str, str], names: Sequence[str], problems: list[str]) -> list[int | None]:
    """The variables as numbers; adds a problem for each that isn't there or is none."""
    numbers = [_number(environ.get(name)) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None:
            problems.append(f"{name} is {environ[name]!r}, which isn't a number" if name in environ else f"{name} isn't set")
    return numbers


def _of_tf_config(text: str) -> Cluster | None:
    fix = """TF_CONFIG='{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": 0}}'"""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _cluster("TF_CONFIG", (), None, [f"{text[:80]!r}, which isn't JSON: {error}"], fix)
    if not isinstance(said, dict):
        return _cluster("TF_CONFIG", (), None, [f"{text[:80]!r}, which isn't an object"], fix)
    if not said.get("cluster") and not said.get("task"):
        return None  # so TensorFlow takes it: one process
    problems: list[str] = []
    listed: dict[str, list[str]] = {"chief": [], "worker": []}
    cluster = said.get("cluster")
    if not isinstance(cluster, dict):
        problems.append(f"the cluster {cluster!r}, which isn't an object" if "cluster" in said else "no cluster")
        cluster = {}
    for role, addresses in cluster.items():
        if role == "ps":
            problems.append("parameter servers (ps): a model is trained by workers alone here")
        elif role not in ("chief", "worker", "evaluator"):
            problems.append(f"the role {role!r}{did_you_mean(role, ('chief', 'worker', 'evaluator'))}")
        elif not isinstance(addresses, list):
            problems.append(f"for the role {role!r} {addresses!r}, which isn't a list of addresses")
        elif role != "evaluator":
            listed[role] = addresses
    if len(listed["chief"]) > 1:
        problems.append(f"{len(listed['chief'])} chiefs: there can be one")
    workers = [*listed["chief"], *listed["worker"]]
    if not workers and not problems:
        problems.append("no worker")
    task = said.get("task")
    if not isinstance(task, dict):
        problems.append(f"the task {task!r}, which isn't an object" if "task" in said else "no task: which worker is this?")
        return _cluster("TF_CONFIG", workers, None, problems, fix)
    role, index = task.get("type"), _number(task.get("index"))
    if role == "evaluator":
        problems.append("the task is an evaluator, and takes no part in training: the workers evaluate together")
    elif role not in ("chief", "worker"):
        problems.append(f"the task's type is {role!r}; it must be 'worker' or 'chief'")
    if index is None:
        problems.append(f"the task's index is {task.get('index')!r}, which isn't a number")
    elif role in ("chief", "worker") and index >= len(listed[role]):
        problems.append(f"the task is {role} {index}, and the cluster lists {len(listed[role])} of these")
        index = None
    elif role == "worker":
        index += len(listed["chief"])
    return _cluster("TF_CONFIG", workers, index, problems, fix)


def _of_own_variables(environ: Mapping[str, str]) -> Cluster:
    problems: list[str] = []
    (index,) = _read_numbers(environ, ["TRANSFERKIT_INDEX"], problems)
    workers = [worker.strip() for worker in environ.get("TRANSFERKIT_WORKERS", "").split(",") if worker.strip()]
    if not workers:
        problems.insert(
            0, "TRANSFERKIT_WORKERS names no worker" if "TRANSFERKIT_WORKERS" in environ else "TRANSFERKIT_WORKERS isn't set"
        )
    fix = "TRANSFERKIT_WORKERS=10.0.0.1:2222,10.0.0.2:2222 everywhere, and TRANSFERKIT_INDEX=0 on the first, 1 on the second"
    return _cluster("TRANSFERKIT_WORKERS and TRANSFERKIT_INDEX", workers, index, problems, fix)


def _of_rank(environ: Mapping[str, str]) -> Cluster:
    problems: list[str] = []
    rank, size, port = _read_numbers(environ, ["RANK", "WORLD_SIZE", "MASTER_PORT"], problems)
    chief = environ.get("MASTER_ADDR", "").strip()
    chief = f"[{chief}]" if ":" in chief and not chief.startswith("[") else chief
    if not chief:
        problems.append("MASTER_ADDR isn't set")
    if size is not None and not 1 <= size <= _MOST:
        problems.append(f"WORLD_SIZE is {size}")
    elif rank is not None and size is not None and rank >= size:
        problems.append(f"RANK is {rank} and WORLD_SIZE {size}: the last rank is {size - 1}")
    if port is not None and size is not None and not 0 < port <= 65535 - min(size, _MOST):
        problems.append(f"MASTER_PORT is {port}: the workers have the {size} ports after it, and ports are 1 to 65535")
    workers: list[str] = []
    if not problems and size is not None and port is not None:
        together = chief in _SAME_HOST or _number(environ.get("LOCAL_WORLD_SIZE")) == size
        workers = [f"{chief if together or i == 0 else ''}:{port + 1 + i}" for i in range(size)]
    fix = (
        "RANK=0 (1, 2, … on the others), and everywhere WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 MASTER_PORT=2222, as torchrun sets them"
    )
    return _cluster("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT", workers, rank, problems, fix)


def _of_slurm(environ: Mapping[str, str], port: int | None) -> Cluster:
    problems: list[str] = []
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    rank, size = _read_numbers(environ, ["SLURM_PROCID", size_name], problems)
    nodes: list[str] = []
    try:
        nodes = slurm_nodes(environ["SLURM_STEP_NODELIST"])
    except ValueError as error:
        problems.append(f"SLURM_STEP_NODELIST: {error}")
    counts: list[int] = []
    try:
        counts = _slurm_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    except ValueError as error:
        problems.append(
            f"SLURM_STEP_TASKS_PER_NODE {error}"
            if "SLURM_STEP_TASKS_PER_NODE" in environ
            else "SLURM_STEP_TASKS_PER_NODE isn't set"
        )
    if port is None:
        job, step = _number(environ.get("SLURM_JOB_ID")), _number(environ.get("SLURM_STEP_ID")) or 0
        if job is None:
            problems.append("SLURM_JOB_ID isn't set, from which the ports are made; give a port")
        port = 15000 + 16 * (((job or 0) + step) % 1000)
    if nodes and counts and len(nodes) != len(counts):
        problems.append(f"{len(nodes)} nodes in SLURM_STEP_NODELIST, and {len(counts)} in SLURM_STEP_TASKS_PER_NODE")
    if counts and size is not None and sum(counts) != size:
        problems.append(f"{sum(counts)} tasks in SLURM_STEP_TASKS_PER_NODE, and {size} in {size_name}")
    workers: list[str] = []
    if not problems:
        places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
        workers = [f"{nodes[node]}:{port + local}" for node, local in places]
        if rank is not None and rank < len(places):
            found = tuple(_number(environ.get(name, str(ours))) for name, ours in zip(_PLACE, places[rank], strict=True))
            if found != places[rank]:
                problems.append(
                    f"task {rank} is task {found[1]} of node {found[0]}; by blocks it would be task {places[rank][1]} of node "
                    f"{places[rank][0]}"
                )
    fix = "start the script by `srun --distribution=block python script.py`, or set TF_CONFIG yourself"
    return _cluster("Slurm's variables", workers, rank, problems, fix)


#: A task's node, and its number on that node.
_PLACE = ("SLURM_NODEID", "SLURM_LOCALID")


def _slurm_counts(text: str) -> list[int]:
    """`2(x3),1` → [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
        if not found:
            raise ValueError(f"is {text!r}; it should be like '2(x3),1'")
        counts += [int(found[1])] * min(int(found[2] or 1), _MOST)
    return counts


def slurm_nodes(text: str) -> list[str]:
    """The names in one of Slurm's lists of nodes, in its order: `node[01-03,7],gpu5` → node01, node02, node03, node7, gpu5.

    A number keeps the width that the first of its range is written in. With several brackets in a name the last one runs fastest.

    Raises:
        ValueError: for what is no such list.
    """
    if not (names := _split_outside(text)):
        raise ValueError("no node")
    nodes: list[str] = []
    for name in names:
        # With a capturing group, every second piece is what stood in brackets.
        pieces = re.split(r"\[([^][]*)\]", name)
        if not name or any(re.search(r"[\s\[\]]", piece) for piece in pieces[::2]):
            raise ValueError(f"{name!r} in {text!r} isn't the name of a node")
        choices = [_numbers(piece, text) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        count = 1
        for choice in choices:
            count *= len(choice)
        if len(nodes) + count > _MOST:
            raise ValueError(f"more than {_MOST} nodes in {text!r}")
        nodes += ["".join(choice) for choice in itertools.product(*choices)]
    return nodes


def _split_outside(text: str) -> list[str]:
    """The parts between the commas that aren't in brackets."""
    return [part.strip() for part in re.split(r",(?![^\[\]]*\])", text)] if text.strip() else []


def _numbers(text: str, whole: str) -> list[str]:
    """What a pair of brackets stands for: `01-03,7` → 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if not found:
            raise ValueError(f"[{text}] in {whole!r} isn't a list of numbers like [01-03,7]")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"[{text}] in {whole!r} counts down")
        if last - first >= _MOST:
            raise ValueError(f"more than {_MOST} nodes in {whole!r}")
        numbers += [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    return numbers
