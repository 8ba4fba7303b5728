"""Workers that meet before they train: who is missing, who differs, and that nobody waits for ever."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Sequence

import pytest

from transferkit.cluster import Cluster
from transferkit.errors import PlacementError, PlanError
from transferkit.meeting import check_in, free_ports

SHORT = 0.6


def addresses(count: int) -> tuple[str, ...]:
    return tuple(f"127.0.0.1:{port}" for port in free_ports(count))


def meet(
    clusters: Sequence[Cluster], *, timeout: float = 20.0, facts: Sequence[dict[str, str]] | None = None, late: float = 0.0
) -> list[Cluster | PlacementError]:
    """What each of the workers got, all at once; the first one comes late."""
    results: dict[int, Cluster | PlacementError] = {}

    def come(place: int) -> None:
        time.sleep(0.0 if place else late)
        try:
            results[place] = check_in(clusters[place], timeout=timeout, facts=facts[place] if facts else None)
        except PlacementError as error:
            results[place] = error

    threads = [threading.Thread(target=come, args=(place,)) for place in range(len(clusters))]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + late + 10)
    assert time.monotonic() - begin < timeout + late + 3, "somebody waited beyond the time"
    return [results[place] for place in range(len(clusters))]


def problems(results: Sequence[Cluster | PlacementError]) -> set[tuple[str, ...]]:
    """What the workers were told; one element when all were told the same."""
    assert all(isinstance(result, PlacementError) for result in results), results
    return {result.found for result in results if isinstance(result, PlacementError)}


def test_all_are_there() -> None:
    workers = addresses(4)
    clusters = [Cluster(workers, index) for index in range(4)]
    assert meet(clusters, late=0.1) == clusters  # the chief comes last
    assert check_in(Cluster(workers[:1], 0)) == Cluster(workers[:1], 0)
    assert meet(clusters) == clusters  # the ports are free again at once


def test_hosts_are_found_out() -> None:
    workers = addresses(3)
    opened = (workers[0], *(":" + worker.partition(":")[2] for worker in workers[1:]))
    assert meet([Cluster(opened, index) for index in range(3)]) == [Cluster(workers, index) for index in range(3)]


def test_a_worker_that_is_missing_is_named_everywhere() -> None:
    workers = addresses(4)
    results = meet([Cluster(workers, index) for index in (0, 1, 3)], timeout=SHORT)
    assert problems(results) == {(f"worker 2 ({workers[2]}) didn't come within 0.6 s",)}
    assert str(results[1]) == (
        f"Meeting as worker 1 ({workers[1]}) of 4, whose chief is {workers[0]}.\n"
        f"  found: worker 2 ({workers[2]}) didn't come within 0.6 s\n"
        "  likely cause: that worker failed as it started, runs elsewhere than its address says, or a firewall is between\n"
        "  to fix it: look at what it printed, and start all workers anew"
    )


def test_a_missing_worker_is_named_by_those_whose_time_is_up_first() -> None:
    workers = addresses(3)
    results = meet([Cluster(workers, index) for index in (0, 1)], timeout=SHORT, late=0.2)
    assert problems(results[1:]) == {(f"worker 2 ({workers[2]}) didn't come within 0.6 s",)}
    assert problems(results[:1]) == {(f"worker 1 ({workers[1]}) came and went again", f"worker 2 ({workers[2]}) didn't come")}


def test_a_chief_that_is_missing() -> None:
    workers = addresses(3)
    results = meet([Cluster(workers, index) for index in (1, 2)], timeout=SHORT)
    assert problems(results) == {(f"worker 0 ({workers[0]}), the chief, can't be reached within 0.6 s: Connection refused",)}


def test_different_versions_and_facts() -> None:
    workers = addresses(3)
    facts = [{"tensorflow": "2.20.0", "x": "1"}, {"tensorflow": "2.19.1", "x": "1"}, {"tensorflow": "2.20.0"}]
    results = meet([Cluster(workers, index) for index in range(3)], facts=facts)
    assert problems(results) == {
        ("tensorflow: 2.20.0 on workers 0, 2; 2.19.1 on worker 1", "x: 1 on workers 0, 1; not told on worker 2")
    }
    assert isinstance(results[0], PlacementError)
    assert (results[0].cause, results[0].fix) == ("the workers aren't installed alike", "run all of them in the same environment")


def test_two_workers_with_one_index() -> None:
    workers = addresses(3)
    results = meet([Cluster(workers, index) for index in (0, 1, 1)])
    assert problems(results) == {
        (f"2 processes take themselves for worker 1 ({workers[1]})", f"no process takes itself for worker 2 ({workers[2]})")
    }


def test_workers_that_believe_in_different_clusters() -> None:
    workers = addresses(4)
    results = meet([Cluster(workers[:3], 0), Cluster(workers, 1), Cluster(workers, 3)])
    ours, theirs = ", ".join(workers[:3]), ", ".join(workers)
    assert problems(results) == {
        (
            "a process takes itself for worker 3; the chief's cluster has 3 workers",
            f"no process takes itself for worker 2 ({workers[2]})",
            f"worker 1 believes in the cluster [{theirs}], the chief in [{ours}]",
            f"worker 3 believes in the cluster [{theirs}], the chief in [{ours}]",
        )
    }


def test_a_port_that_is_taken() -> None:
    workers = addresses(3)
    clusters = [Cluster(workers, index) for index in range(3)]
    ports = [int(worker.partition(":")[2]) for worker in workers]
    with socket.create_server(("127.0.0.1", ports[2])):
        told = f"worker 2 ({workers[2]}) can't listen on port {ports[2]}: Address already in use"
        assert problems(meet(clusters)) == {(told,)}
    with socket.create_server(("", ports[0])):  # on all devices
        results = meet(clusters, timeout=SHORT)
        told = f"worker 0 ({workers[0]}) can't listen on port {ports[0]}: Address already in use"
        assert problems(results[:1]) == {(told,)}
        told = f"where worker 0 ({workers[0]}), the chief, should be, something else answers, or a chief that has begun already"
        assert problems(results[1:]) <= {(told,), (f"worker 0 ({workers[0]}), the chief, didn't answer within 0.6 s",)}
    assert meet(clusters) == clusters


def test_a_worker_that_dies_while_the_others_wait() -> None:
    workers = addresses(3)
    port = int(workers[0].partition(":")[2])

    def die() -> None:
        hello = {"transferkit meeting": 1, "index": 1, "workers": list(workers), "facts": {}, "problems": []}
        text = json.dumps(hello).encode()
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(struct.pack(">I", len(text)) + text)
                connection.recv(1)
                return
            time.sleep(0.02)

    dying = threading.Thread(target=die)
    dying.start()
    begin = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        check_in(Cluster(workers, 0), timeout=30)
    dying.join()
    assert time.monotonic() - begin < 10
    assert caught.value.found[:2] == (f"worker 1 ({workers[1]}) came and went again", f"worker 2 ({workers[2]}) didn't come")


NOISE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\xff\xff\xff\xff",
    struct.pack(">I", 3) + b"abc",
    struct.pack(">I", 2) + b"[]",
    struct.pack(">I", 200_000) + b"[" * 200_000,
    *(
        struct.pack(">I", len(text)) + text
        for text in (
            json.dumps({"transferkit meeting": 1, **said}).encode()
            for said in (
                {},
                {"index": "1", "workers": [], "facts": {}, "problems": []},
                {"index": 1, "workers": "a", "facts": {}, "problems": []},
                {"index": 1, "workers": [], "facts": {"a": 1}, "problems": []},
                {"index": 1, "workers": [], "facts": {}, "problems": [["no kind", "x"]]},
                {"index": 1, "workers": [], "facts": {str(n): "" for n in range(100)}, "problems": []},
            )
        )
    ),
]


def test_strangers_change_nothing() -> None:
    workers = addresses(2)
    port = int(workers[0].partition(":")[2])
    clusters = [Cluster(workers, index) for index in range(2)]
    silent: list[socket.socket] = []

    def disturb() -> None:
        for piece in NOISE:
            for _ in range(100):
                try:
                    connection = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    time.sleep(0.01)
                    continue
                silent.append(connection)  # stays open
                with contextlib.suppress(OSError):
                    connection.sendall(piece)
                break
        results.append(check_in(clusters[1]))

    results: list[Cluster] = []
    other = threading.Thread(target=disturb)
    other.start()
    assert check_in(clusters[0]) == clusters[0]
    other.join()
    assert results == [clusters[1]]
    assert len(silent) == len(NOISE)
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x12\x04\x00", struct.pack(">I", 2) + b"{}"]
)
def test_a_chief_that_is_something_else(answer: bytes) -> None:
    workers = addresses(2)
    port = int(workers[0].partition(":")[2])
    end = threading.Event()
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while not end.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        with pytest.raises(PlacementError) as caught:
            check_in(Cluster(workers, 1), timeout=SHORT)
        end.set()
        serving.join()
    assert caught.value.found[0].startswith(f"where worker 0 ({workers[0]}), the chief, should be, something else answers")


def test_what_is_told_is_made_fit_to_print() -> None:
    workers = addresses(2)
    facts = [{"x": "1"}, {"x": "\x1b[31mred\n" + "y" * 1000}]
    (told,) = problems(meet([Cluster(workers, index) for index in range(2)], facts=facts))
    assert told == ("x: 1 on worker 0; ?[31mred?" + "y" * 191 + " on worker 1",)


def test_a_timeout_that_is_none() -> None:
    with pytest.raises(PlanError, match=r"found: timeout=0"):
        check_in(Cluster(addresses(2), 0), timeout=0)


def test_free_ports() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    assert all(20_000 <= port < 32_768 for port in ports)
    with pytest.raises(PlacementError, match="Looking for 20000 free ports"):
        free_ports(20_000)
