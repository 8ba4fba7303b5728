"""`launch`: a process for each worker on this machine, watched over until all have ended.

Workers that train together are lost together: when one dies, the others wait in a collective for good. So the first that fails
stops all, and with restarts all begin anew, on other ports, from the last checkpoint that the script wrote.

All workers of a start are in one group of processes, which a guard leads: a process that reads from a pipe whose other end this
one holds. However this process ends, by SIGKILL too, the system closes that end, and the guard kills the group: the workers, what
they started themselves, and itself. A worker that is just being started then finds no group to join, and doesn't start. Output
goes straight to the log files, of which the chief's is followed here, so that nothing is lost with this process and nobody waits
for it to read. POSIX only. Imports the standard library and what is as pure.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from transferkit._table import Table, Tabular
from transferkit.cluster import Cluster
from transferkit.errors import PlacementError, PlanError, StorageError
from transferkit.meeting import free_ports

__all__ = ["HUNG", "Launched", "Loss", "launch"]

#: The exit code of a launch whose workers hung: that of timeout(1).
HUNG = 124
#: Seconds that workers have to end by themselves when another one was lost; they can't finish a step without it.
_AFTER_A_LOSS = 5.0
_GUARD = (
    "import os, signal, sys\n"
    "for name in ('SIGINT', 'SIGTERM', 'SIGHUP'): signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
    "sys.stdin.buffer.read()\n"
    "os.killpg(0, signal.SIGKILL)\n"
)
_LAST_LINES, _LAST_BYTES = 20, 1 << 14


@dataclass(frozen=True)
class Loss:
    """A worker that failed or was killed, and so ended a start.

    Args:
        start: Which start of the workers, counted from 1.
        worker: Which worker, counted from 0; None when all of them hung.
        ending: How it ended, in words.
        code: The exit code for it: its own, 128 + the signal that killed it, or `HUNG`.
        seconds: Since that start.
        lines: The last lines that it wrote.
    """

    start: int
    worker: int | None
    ending: str
    code: int
    seconds: float
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launched(Tabular):
    """What became of a launch.

    Args:
        workers: How many there were.
        starts: How often they were started.
        losses: The worker that ended each start but the last, and the last too unless it ended well.
        code: The exit code: 0 when all ended well.
        seconds: From the first start to the end.
        log_dir: Where the logs are; None when they were temporary and all ended well.
    """

    workers: int
    starts: int
    losses: tuple[Loss, ...]
    code: int
    seconds: float
    log_dir: str | None

    def table(self) -> Table:
        ended = "all ended well" if self.code == 0 else f"exit code {self.code}"
        starts = "1 start" if self.starts == 1 else f"{self.starts} starts"
        return Table(
            columns=("start", "worker", "lost by", ">after s") if self.losses else (),
            rows=[
                (str(loss.start), "all" if loss.worker is None else str(loss.worker), loss.ending, f"{loss.seconds:.1f}")
                for loss in self.losses
            ],
            title=f"{self.workers} workers, {starts}, {self.seconds:.1f} s: {ended}",
            notes=[f"logs in {self.log_dir}"] if self.log_dir else [],
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def launch(
    command: Sequence[str],
    *,
    workers: int,
    restarts: int = 0,
    log_dir: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    grace: float = 30.0,
    timeout: float | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Launched:
    """Starts the command once for each worker, with `TF_CONFIG`, and waits until all have ended; prints what the chief prints.

    Ctrl-C and SIGTERM are passed on to all workers, which get `grace` seconds; a second one kills them.

    Args:
        command: The program and its arguments.
        workers: How many; each on a free port of the loopback device.
        restarts: How often all are started anew when one is lost. What they did is repeated, unless the script takes it up
            (`fit(…, checkpoint_dir=…, resume=True)`).
        log_dir: The folder for `worker-0.log` and so on, which are appended to. None takes a temporary one, which goes when all
            ends well.
        threads: Threads for computing that each worker has (`TF_NUM_INTRAOP_THREADS`, `OMP_NUM_THREADS`). None shares the
            processors out evenly, unless the environment has the variables already.
        grace: Seconds from a signal until workers that go on are killed. Once one has ended with an exit code but 0, it is five
            more at most.
        timeout: Seconds in which no worker writes a line, after which they are taken for hung; None to wait for ever.
        environ: The environment of the workers.

    Raises:
        PlanError: for numbers that can't be, every problem at once.
        PlacementError: when a worker can't be started, or this system isn't POSIX.
        StorageError: when the logs can't be written.
    """
    _check(command, workers, restarts, threads, grace, timeout)
    news: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    begun = time.monotonic()
    losses: list[Loss] = []
    folder = Path(tempfile.mkdtemp(prefix="transferkit-launch-") if log_dir is None else log_dir)
    shared, words = _shares(environ, workers, threads)
    with _signals(news):
        for start in range(1, restarts + 2):
            addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(workers))
            title = "start" if start == 1 else f"start {start} of at most {restarts + 1}"
            _say(f"{title}: {workers} workers, {words}; logs in {folder}")
            environs = [
                {**variables, "TF_CONFIG": Cluster(addresses, index).tf_config()} for index, variables in enumerate(shared)
            ]
            with _Start(command, environs, folder, start, news) as running:
                loss, received = _watch(running, news, grace, timeout)
                if loss is not None:
                    losses.append(loss)
                    _say_loss(loss, running)
            if loss is None or received is not None:
                break
    code = losses[-1].code if loss is not None else 128 + received if received is not None and running.was_killed else 0
    if code == 0 and log_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    kept = None if code == 0 and log_dir is None else str(folder)
    return Launched(workers, start, tuple(losses), code, time.monotonic() - begun, kept)


def _check(command: Sequence[str], workers: int, restarts: int, threads: int | None, grace: float, timeout: float | None) -> None:
    problems = [] if command else ["no command"]
    for name, number, least in (("workers", workers, 1), ("restarts", restarts, 0), ("threads", threads, 1)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
            problems.append(f"{name}={number!r}, which isn't a whole number from {least} on")
    for name, seconds in (("grace", grace), ("timeout", timeout)):
        if seconds is not None and not 0 < seconds < math.inf:
            problems.append(f"{name}={seconds!r}, which isn't a number of seconds above 0")
    if problems:
        raise PlanError("Launching workers.", found=problems, fix="python -m transferkit launch --workers 4 script.py")
    if os.name != "posix":
        raise PlacementError(
            "Launching workers.",
            found=f"the system {os.name!r}, whose processes have no groups",
            fix="start a process for each worker yourself, with TF_CONFIG or TRANSFERKIT_WORKERS and TRANSFERKIT_INDEX",
        )


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _say_loss(loss: Loss, running: _Start) -> None:
    if loss.worker is None:
        _say(f"{loss.ending}; {running.folder} has the threads of each worker")
        return
    log = running.logs[loss.worker].path
    _say(
        f"worker {loss.worker} {loss.ending} after {loss.seconds:.1f} s"
        + (f"; the end of {log}:" if loss.lines else f"; see {log}")
    )
    for line in loss.lines:
        print(f"    {line}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ what each worker has


def _shares(environ: Mapping[str, str], workers: int, threads: int | None) -> tuple[list[dict[str, str]], str]:
    """The environment of each worker but for its cluster, and what is in it in words.

    Each would otherwise take all processors for itself, and several times as many threads as processors hinder one another.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = str(max(1, processors // workers) if threads is None else threads)
    names = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
    set_here = {name: each for name in names if threads is not None or name not in environ}
    common = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **environ, **set_here}
    words = ", ".join(f"{name}={value}" for name, value in ((name, common[name]) for name in names))
    gpus = _gpus(environ)
    if len(gpus) < workers:
        return [dict(common) for _ in range(workers)], words
    of_each = [",".join(gpus[index * len(gpus) // workers : (index + 1) * len(gpus) // workers]) for index in range(workers)]
    return [{**common, "CUDA_VISIBLE_DEVICES": share} for share in of_each], f"{words}, GPUs {' | '.join(of_each)}"


def _gpus(environ: Mapping[str, str]) -> list[str]:
    """The names of this machine's GPUs, as far as they can be told without their driver."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = [gpu.strip() for gpu in named.split(",")]
        return [] if "" in gpus or "-1" in gpus else gpus
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


# ---------------------------------------------------------------------------------------------------------- processes


class _Log:
    """A worker's log: what this start adds to it, and following it.

    Args:
        path: The file, which is appended to.
        title: A line to begin with.
    """

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        try:
            self.file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by the start it belongs to)
            self.file.write(f"=== {title}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n".encode())
        except OSError as error:
            raise StorageError(
                "Opening a worker's log.", found=f"{path}: {error.strerror or error}", fix="--log-dir with a folder to write to"
            ) from error
        self._begin = self._shown = self.size()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.file.fileno()).st_size

    def show(self) -> None:
        """Prints what was added since the last time."""
        while piece := os.pread(self.file.fileno(), 1 << 16, self._shown):
            self._shown += len(piece)
            try:
                sys.stdout.write(self._decoder.decode(piece))
                sys.stdout.flush()
            except BrokenPipeError:  # the reader of our output has seen enough; the log has the rest
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def last_lines(self) -> tuple[str, ...]:
        """The end of what this start added."""
        begin = max(self._begin, self.size() - _LAST_BYTES)
        text = os.pread(self.file.fileno(), _LAST_BYTES, begin).decode(errors="replace")
        return tuple(text.splitlines()[-_LAST_LINES:])


class _Start:
    """All workers of one start, as a context: at its end none of their processes is left.

    Args:
        command: The program and its arguments.
        environs: The environment of each worker.
        folder: Where the logs go.
        number: Which start it is, counted from 1.
        news: Where `("ended", worker)` is put.
    """

    def __init__(
        self,
        command: Sequence[str],
        environs: Sequence[Mapping[str, str]],
        folder: Path,
        number: int,
        news: queue.SimpleQueue[tuple[str, int]],
    ) -> None:
        self._command, self._environs, self._news = list(command), environs, news
        self.folder, self.number = folder, number
        self.logs: list[_Log] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.alive: set[int] = set()
        self.was_killed = False
        self._stack = contextlib.ExitStack()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Start:
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    "Making the folder for logs.", found=f"{self.folder}: {error.strerror or error}", fix="another --log-dir"
                ) from error
            for index in range(len(self._environs)):
                self.logs.append(_Log(self.folder / f"worker-{index}.log", f"start {self.number} of worker {index}"))
                stack.callback(self.logs[-1].file.close)
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **_group(0),
            )
            stack.callback(self._end)
            for log, environ in zip(self.logs, self._environs, strict=True):
                try:
                    process = subprocess.Popen(
                        self._command,
                        env=environ,
                        stdin=subprocess.DEVNULL,
                        stdout=log.file,
                        stderr=subprocess.STDOUT,
                        **_group(self._guard.pid),
                    )
                except OSError as error:
                    raise PlacementError(
                        f"Starting {self._command[0]!r} as worker {len(self.processes)}.",
                        found=error.strerror or str(error),
                        fix="give a program that can be run, and fewer workers where the system allows no more processes",
                    ) from error
                self.processes.append(process)
            self.begun = time.monotonic()
            self.alive = set(range(len(self.processes)))
            for index in sorted(self.alive):
                self._threads.append(threading.Thread(target=self._wait, args=(index,), daemon=True))
                self._threads[-1].start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait(self, index: int) -> None:
        self.processes[index].wait()
        self._news.put(("ended", index))

    def send(self, number: int) -> None:
        """A signal to every worker that is alive."""
        for index in self.alive:
            self.processes[index].send_signal(number)

    def kill(self) -> None:
        """Ends every process of the workers, and the guard, at once."""
        self.was_killed = self.was_killed or bool(self.alive)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended (macOS says the second)
            os.killpg(self._guard.pid, signal.SIGKILL)
        for process in self.processes:  # one that has left the group
            process.kill()

    def _end(self) -> None:
        self.kill()
        for process in [*self.processes, self._guard]:
            process.wait()
        for thread in self._threads:
            thread.join()
        if self._guard.stdin is not None:
            self._guard.stdin.close()


def _group(leader: int) -> dict[str, Any]:
    """The argument by which `Popen` puts a process into the group of `leader`, or at the head of its own for 0."""
    if sys.version_info >= (3, 11):
        return {"process_group": leader}
    return {"preexec_fn": functools.partial(os.setpgid, 0, leader)}


@contextlib.contextmanager
def _signals(news: queue.SimpleQueue[tuple[str, int]]) -> Iterator[None]:
    """Puts `("signal", number)` into the news, where the main thread is this one, for the time of the block."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        news.put(("signal", number))  # SimpleQueue.put may be called from a handler that interrupts itself

    before: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored (nohup, a background job): to stay so
                    before[number] = signal.signal(number, handle)
        yield
    finally:
        for ours, handler in before.items():
            signal.signal(ours, handler)


def _watch(
    running: _Start, news: queue.SimpleQueue[tuple[str, int]], grace: float, timeout: float | None
) -> tuple[Loss | None, int | None]:
    """Waits until all workers have ended, and sees to it that they do: the first loss, and the signal that came."""
    loss: Loss | None = None
    received: int | None = None
    deadline = math.inf
    written, silent, before = -1, 0.0, running.begun
    while running.alive:
        kind, number = "", -1
        with contextlib.suppress(queue.Empty):
            kind, number = news.get(timeout=0.1)
        now = time.monotonic()
        if kind == "signal" and received is None:
            received, deadline = number, min(deadline, now + grace)
            _say(f"{signal.Signals(number).name}: passed on to the workers, which have {grace:g} s; a second one kills them")
            running.send(signal.SIGTERM if number == signal.SIGHUP else number)  # of a terminal's end training knows nothing
        elif kind == "signal":
            running.kill()
        elif kind == "ended":
            running.alive.discard(number)
            code = running.processes[number].returncode
            if code != 0 and loss is None and not running.was_killed:
                loss = _loss(running, number, code, now)
                # After a signal, one may have left before a step that another is in already.
                deadline = min(deadline, now + min(grace, _AFTER_A_LOSS))
                if received is None:
                    running.send(signal.SIGTERM)
        running.logs[0].show()
        size = sum(log.size() for log in running.logs)
        # A turn takes a tenth of a second; where it took much longer, this process, and perhaps all, had been stopped.
        written, silent, before = size, silent + min(now - before, 1.0) if size == written else 0.0, now
        if timeout is not None and silent > timeout and loss is None and received is None:
            # By this signal a Python process writes where each of its threads is.
            running.send(signal.SIGABRT)
            loss = Loss(running.number, None, f"no worker wrote a line for {timeout:g} s", HUNG, now - running.begun)
            deadline = now + min(grace, _AFTER_A_LOSS)
        if now > deadline and running.alive:
            _say(f"not ended in time, and killed: {', '.join(f'worker {index}' for index in sorted(running.alive))}")
            running.kill()
            deadline = math.inf
    running.logs[0].show()
    return loss, received


def _loss(running: _Start, worker: int, code: int, now: float) -> Loss:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        ending, code = f"was killed by {name}", 128 - code
    else:
        ending = f"ended with exit code {code}"
    # What the chief wrote was shown already.
    return Loss(running.number, worker, ending, code, now - running.begun, running.logs[worker].last_lines() if worker else ())
