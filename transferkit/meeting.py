"""`check_in`: before they train, all workers meet, so that what is wrong between them is an error of words and not a silence.

A collective of TensorFlow's waits for every worker, for good where one is missing, and fails in its own way where two run
different versions. So the workers first meet at the chief by TCP. Each says which worker it takes itself for, which cluster it
believes in and what it runs; the chief compares, and tells all of them the same.

They meet at the chief's own port, before TensorFlow listens there: it is the one port of which it is known that it is free for us
and that the others can reach. Nothing of the meeting is in TensorFlow's way afterwards. The listening socket is closed, and the
guests hang up first, so that it is their ports that the system keeps in TIME_WAIT.

What is sent is a length, then that many bytes of JSON, at most `_LONGEST`, all by a deadline. Nothing is run or loaded, and what
doesn't speak like this is hung up on. Imports the standard library and what is as pure.
"""

from __future__ import annotations

import contextlib
import json
import platform
import random
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transferkit.cluster import Cluster, split_address
from transferkit.errors import PlacementError, PlanError

__all__ = ["check_in", "free_ports"]

_LONGEST = 1 << 20
_HEADER = struct.Struct(">I")
_MOST_FACTS = 64
#: Seconds in which a guest must have taken what it is told, and hung up.
_FAREWELL = 2.0
_PACKAGES = ("transferkit", "tensorflow", "keras", "numpy")

#: Kind of problem → its likely cause, and what mends it.
_KINDS = {
    "absent": (
        "that worker failed as it started, runs elsewhere than its address says, or a firewall is between",
        "look at what it printed, and start all workers anew",
    ),
    "port": ("another program has the port, perhaps what is left of an earlier run", "end it, or give the workers other ports"),
    "roles": (
        "the workers were given different lists, or two the same index",
        "give all the same list, and each an index of its own",
    ),
    "facts": ("the workers aren't installed alike", "run all of them in the same environment"),
}
#: A kind, and what was found.
_Problem = tuple[str, str]


def check_in(cluster: Cluster, *, timeout: float = 30.0, facts: Mapping[str, str] | None = None) -> Cluster:
    """Waits until every worker is there, and compares what they are; for TensorFlow's server the port is free again afterwards.

    Call it in every worker, before `tf.distribute.MultiWorkerMirroredStrategy` is made.

    Args:
        cluster: The workers, and which of them this process is.
        timeout: Seconds that this process waits for the others.
        facts: What must be the same everywhere, by name. The versions of Python, and of transferkit, TensorFlow, Keras and NumPy
            where they are imported, are compared besides.

    Returns:
        The cluster, with the hosts that weren't known filled in.

    Raises:
        PlacementError: the same on every worker, when one is missing, two take themselves for the same, believe in different
            clusters, run different versions or have different facts, or a worker's port is taken.
    """
    if not timeout > 0:
        raise PlanError("Meeting the other workers.", found=f"timeout={timeout!r}", fix="timeout=30.0, in seconds")
    deadline = time.monotonic() + timeout
    if cluster.is_chief:  # the first to give up, so that those who came at the same time hear why
        deadline -= 0.05 * timeout
    own = _Hello(cluster.index, cluster.workers, _versions() | {name: str(value) for name, value in (facts or {}).items()})
    if cluster.is_chief:
        return _receive(cluster, own, deadline, timeout)
    with contextlib.suppress(OSError, ValueError):  # not found out: TensorFlow will see
        _try_port(cluster, own)
    return _visit(cluster, own, deadline, timeout)


def _versions() -> dict[str, str]:
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        version = getattr(sys.modules.get(package), "__version__", None)
        if isinstance(version, str):
            found[package] = version
    return found


@dataclass(frozen=True)
class _Hello:
    """What a worker says of itself."""

    index: int
    workers: tuple[str, ...]
    facts: Mapping[str, str]
    problems: list[_Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"index": self.index, "workers": list(self.workers), "facts": dict(self.facts), "problems": self.problems}

    @classmethod
    def of(cls, said: dict[str, Any]) -> _Hello:
        """The hello in a message.

        Raises:
            ValueError: for a message that is none.
        """
        index, workers, facts, problems = (said.get(name) for name in ("index", "workers", "facts", "problems"))
        if not isinstance(index, int) or isinstance(index, bool) or not isinstance(facts, dict) or len(facts) > _MOST_FACTS:
            raise ValueError("not a hello")
        return cls(index, _texts(workers), {_plain(k): _plain(v) for k, v in facts.items()}, list(_read_problems(problems)))


def _plain(text: object, most: int = 200) -> str:
    """A text from elsewhere as it may stand in a message."""
    if not isinstance(text, str):
        raise ValueError("not a text")
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


def _texts(value: object, most: int = 200) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return tuple(_plain(item, most) for item in value)


def _read_problems(value: object) -> list[_Problem]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    pairs = [_texts(item, 4000) for item in value]
    if not all(len(pair) == 2 and pair[0] in _KINDS for pair in pairs):
        raise ValueError("not a list of problems")
    return [(kind, found) for kind, found in pairs]


# ------------------------------------------------------------------------------------------------------------- messages


def _packed(said: Mapping[str, Any]) -> bytes:
    text = json.dumps({"transferkit meeting": 1, **said}).encode()
    if len(text) > _LONGEST:
        raise PlanError("Meeting the other workers.", found=f"{len(text)} bytes of facts and addresses", fix="give fewer facts")
    return _HEADER.pack(len(text)) + text


class _Unpacker:
    """Cuts what comes in into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def messages(self, piece: bytes) -> Iterator[dict[str, Any]]:
        """Those that are complete with this piece.

        Raises:
            ValueError: for what isn't of this meeting.
        """
        self._buffer += piece
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > _LONGEST:
                raise ValueError("too long")
            if len(self._buffer) < _HEADER.size + length:
                return
            text = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
            del self._buffer[: _HEADER.size + length]
            try:
                said = json.loads(text)
            except RecursionError:
                raise ValueError("too deep") from None
            if not isinstance(said, dict) or said.get("transferkit meeting") != 1:
                raise ValueError("not of this meeting")
            yield said


# ---------------------------------------------------------------------------------------------------------------- chief


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bound(host: str, port: int) -> socket.socket:
    """A socket on that port: of the loopback device alone where the host is this one, else of all devices.

    Raises:
        OSError: when the port is taken.
    """
    listener = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:  # what a run before left in TIME_WAIT is no obstacle; a socket that listens still is
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        local = host == "localhost" or host.startswith("127.") or host == "::1"
        listener.bind((("127.0.0.1" if host == "localhost" else host) if local else "", port))
    except OSError:
        listener.close()
        raise
    return listener


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on.

    They are below those that systems give to connections that go out (from 32768 on Linux), so none of these can take one.

    Raises:
        PlacementError: when so many can't be found.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_768), 4_000):
        if len(ports) == count:
            break
        with contextlib.suppress(OSError):
            _bound("", port).close()
            ports.append(port)
    if len(ports) < count:
        raise PlacementError(
            f"Looking for {count} free ports.", found=f"{len(ports)} between 20000 and 32767", fix="end what listens there"
        )
    return ports


def _try_port(cluster: Cluster, own: _Hello) -> None:
    """Adds a problem to the hello when this worker's port is taken."""
    try:
        _bound(*split_address(cluster.workers[cluster.index])).close()
    except OSError as error:
        own.problems.append(_taken(cluster, error))


def _taken(cluster: Cluster, error: OSError) -> _Problem:
    port = split_address(cluster.workers[cluster.index])[1]
    return "port", f"{cluster.name(cluster.index)} can't listen on port {port}: {error.strerror or error}"


@dataclass
class _Guest:
    """A connection to the chief, and what came over it."""

    connection: socket.socket
    host: str
    unpacker: _Unpacker = field(default_factory=_Unpacker)
    hello: _Hello | None = None


def _receive(cluster: Cluster, own: _Hello, deadline: float, timeout: float) -> Cluster:
    """The chief's side: hears all, judges, and tells them."""
    try:
        listener = _bound(*split_address(cluster.workers[0]))
    except OSError as error:
        raise _error(cluster, [_taken(cluster, error)]) from error
    guests: dict[socket.socket, _Guest] = {}
    left: list[int] = []
    try:
        with listener, selectors.DefaultSelector() as selector:
            listener.listen(min(cluster.size + 16, 1024))
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ)
            while _heard(guests) + 1 < cluster.size and not left and (remaining := deadline - time.monotonic()) > 0:
                news = False
                for key, _ in selector.select(min(remaining, 1.0)):
                    if key.fileobj is listener:
                        _open(listener, guests, selector, 4 * cluster.size + 64)
                        continue
                    guest = guests[key.data]
                    had = guest.hello
                    if not _listen(guest):
                        selector.unregister(guest.connection)
                        guest.connection.close()
                        del guests[key.data]
                        left += [] if had is None else [had.index]
                    news = news or guest.hello is not had
                if news:
                    missing = sorted({*range(cluster.size)} - {0, *(g.hello.index for g in guests.values() if g.hello)})
                    _tell(guests, {"missing": missing})
            came = (guest.hello for guest in guests.values() if guest.hello)
            hellos = [own, *sorted(came, key=lambda hello: hello.index)]
            problems = _differences(cluster, hellos, left, timeout)
            hosts = {guest.hello.index: guest.host for guest in guests.values() if guest.hello}
            whole = cluster if problems else _completed(cluster, hosts)
            _tell(guests, {"problems": problems, "workers": list(whole.workers)})
        until = time.monotonic() + _FAREWELL
        for guest in guests.values():
            if guest.hello is not None:
                _wait_for_the_end(guest.connection, until)
    finally:
        for guest in guests.values():
            guest.connection.close()
    if problems:
        raise _error(cluster, problems)
    return whole


def _heard(guests: Mapping[socket.socket, _Guest]) -> int:
    return sum(guest.hello is not None for guest in guests.values())


def _open(listener: socket.socket, guests: dict[socket.socket, _Guest], selector: selectors.BaseSelector, most: int) -> None:
    with contextlib.suppress(OSError):  # it may have gone again
        connection, address = listener.accept()
        if len(guests) >= most:
            connection.close()
            return
        connection.setblocking(False)
        guests[connection] = _Guest(connection, str(address[0]))
        selector.register(connection, selectors.EVENT_READ, data=connection)


def _listen(guest: _Guest) -> bool:
    """Takes what a guest says; False when it has gone or isn't one of ours."""
    try:
        piece = guest.connection.recv(1 << 16)
        for said in guest.unpacker.messages(piece):
            guest.hello = _Hello.of(said)
    except BlockingIOError:
        return True
    except (OSError, ValueError):
        return False
    return bool(piece)


def _tell(guests: Mapping[socket.socket, _Guest], said: Mapping[str, Any]) -> None:
    message = _packed(said)
    for guest in guests.values():
        if guest.hello is not None:
            with contextlib.suppress(OSError):  # who has gone needn't be told
                guest.connection.settimeout(_FAREWELL)
                guest.connection.sendall(message)
                guest.connection.setblocking(False)


def _wait_for_the_end(connection: socket.socket, until: float) -> None:
    """Waits until the other side has hung up."""
    with contextlib.suppress(OSError):
        while (remaining := until - time.monotonic()) > 0:
            connection.settimeout(remaining)
            if not connection.recv(1 << 16):
                return


def _completed(cluster: Cluster, hosts: Mapping[int, str]) -> Cluster:
    """The cluster with the hosts from which the guests came, where they weren't known."""
    chief = cluster.workers[0].rpartition(":")[0]

    def address(index: int, worker: str) -> str:
        if not worker.startswith(":"):
            return worker
        host = hosts[index]
        if host.startswith("127.") or host == "::1":  # beside the chief
            return f"{chief}{worker}"
        return f"[{host}]{worker}" if ":" in host else f"{host}{worker}"

    return replace(cluster, workers=tuple(address(i, w) for i, w in enumerate(cluster.workers)))


def _differences(cluster: Cluster, hellos: Sequence[_Hello], left: Sequence[int], timeout: float) -> list[_Problem]:
    """Everything that is wrong with those who came, the chief being the first."""
    problems = [problem for hello in hellos for problem in hello.problems]
    came = [hello.index for hello in hellos]
    for index in sorted({*came, *left}):
        known = 0 <= index < cluster.size
        name = cluster.name(index) if known else f"worker {index}"
        if not known:
            problems.append(("roles", f"a process takes itself for {name}; the chief's cluster has {cluster.size} workers"))
        if came.count(index) > 1:
            problems.append(("roles", f"{came.count(index)} processes take themselves for {name}"))
        if index in left:
            problems.append(("absent", f"{name} came and went again"))
    for index in range(cluster.size):
        if index not in came and index not in left:
            if len(hellos) >= cluster.size:
                problems.append(("roles", f"no process takes itself for {cluster.name(index)}"))
            else:
                problems.append(("absent", f"{cluster.name(index)} didn't come" + ("" if left else f" within {timeout:g} s")))
    for hello in hellos[1:]:
        if hello.workers != cluster.workers:
            theirs, ours = _listed(hello.workers), _listed(cluster.workers)
            problems.append(("roles", f"worker {hello.index} believes in the cluster {theirs}, the chief in {ours}"))
    for name in sorted({name for hello in hellos for name in hello.facts}):
        groups: dict[str, list[int]] = {}
        for hello in hellos:
            groups.setdefault(hello.facts.get(name, "not told"), []).append(hello.index)
        if len(groups) > 1:
            said = "; ".join(f"{value} on {_workers(indices)}" for value, indices in groups.items())
            problems.append(("facts", f"{name}: {said}"))
    return problems


def _listed(workers: Sequence[str]) -> str:
    shown = ", ".join(workers[:4])
    return f"[{shown}]" if len(workers) <= 4 else f"[{shown} and {len(workers) - 4} more]"


def _workers(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in sorted(indices)[:8]) + (" …" if len(indices) > 8 else "")
    return f"worker {shown}" if len(indices) == 1 else f"workers {shown}"


def _error(cluster: Cluster, problems: Sequence[_Problem]) -> PlacementError:
    kinds = [_KINDS[kind] for kind in dict.fromkeys(kind for kind, _ in problems)]
    return PlacementError(
        f"Meeting as {cluster}.",
        found=[found for _, found in problems],
        cause="; or ".join(cause for cause, _ in kinds),
        fix="; ".join(fix for _, fix in kinds),
    )


# ---------------------------------------------------------------------------------------------------------------- guest


def _visit(cluster: Cluster, own: _Hello, deadline: float, timeout: float) -> Cluster:
    """The side of the others: goes to the chief and hears what it found."""
    chief = f"{cluster.name(0)}, the chief,"
    problem = ("absent", f"{chief} didn't answer within {timeout:g} s")
    pause = 0.05
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(split_address(cluster.workers[0]), timeout=min(remaining, 5.0))
        except OSError as error:
            problem = ("absent", f"{chief} can't be reached within {timeout:g} s: {error.strerror or error}")
        else:
            with connection:
                answer = _ask(connection, own, deadline)
            if answer.workers is not None:
                return _heeded(cluster, answer.problems, answer.workers)
            if answer.missing is not None and time.monotonic() < deadline:
                raise _error(cluster, [("absent", f"{chief} went away before all were there")])
            if answer.missing is not None:
                names = [cluster.name(index) for index in answer.missing if 0 <= index < cluster.size]
                raise _error(cluster, [("absent", f"{name} didn't come within {timeout:g} s") for name in names] or [problem])
            problem = ("port", f"where {chief} should be, something else answers, or a chief that has begun already")
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, 0.5)
    raise _error(cluster, [problem, *own.problems])


@dataclass(frozen=True)
class _Answer:
    """What the chief said: at the end the problems and the workers; before, for whom it waits."""

    problems: Sequence[_Problem] = ()
    workers: tuple[str, ...] | None = None
    missing: Sequence[int] | None = None


def _ask(connection: socket.socket, own: _Hello, deadline: float) -> _Answer:
    """The last of what was heard by the deadline; nothing where it is no chief that answers."""
    heard = _Answer()
    unpacker = _Unpacker()
    with contextlib.suppress(OSError, ValueError):
        # On the loopback device a port that nobody listens on can connect to itself, where it is one the system gives out.
        if connection.getsockname() == connection.getpeername():
            return heard
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        connection.sendall(_packed(own.to_json()))
        while (remaining := deadline - time.monotonic()) > 0:
            connection.settimeout(remaining)
            piece = connection.recv(1 << 16)
            if not piece:
                break
            for said in unpacker.messages(piece):
                if "workers" in said:
                    return _Answer(_read_problems(said.get("problems")), _texts(said["workers"]))
                missing = said.get("missing")
                if isinstance(missing, list):
                    heard = _Answer(missing=[index for index in missing if isinstance(index, int)])
    return heard


def _heeded(cluster: Cluster, problems: Sequence[_Problem], workers: tuple[str, ...]) -> Cluster:
    if problems:
        raise _error(cluster, problems)
    try:
        return replace(cluster, workers=workers)
    except PlanError as error:
        raise _error(cluster, [("roles", f"the chief's answer: {problem}") for problem in error.found]) from error
