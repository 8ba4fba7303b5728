"""Workers that are started, watched, stopped and started anew; small scripts stand for training."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transferkit.cluster import find_cluster
from transferkit.errors import PlacementError, PlanError, StorageError
from transferkit.launching import _gpus, _shares, launch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the launcher needs POSIX")

#: What every script begins with: it knows which worker it is, and can wait for files.
BEGIN = """
import json, os, pathlib, signal, subprocess, sys, time
task = json.loads(os.environ["TF_CONFIG"])
me, count = task["task"]["index"], len(task["cluster"]["worker"])
folder = pathlib.Path(__file__).parent
def mark(name): (folder / name).write_text(str(os.getpid()))
def wait_for(*names):
    end = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < end
        time.sleep(0.01)
mark(f"begun{me}")
wait_for(*(f"begun{i}" for i in range(count)))
"""
#: A collective that waits for a worker that is gone: deaf to SIGTERM, as one that C++ code keeps from running Python is.
HANG = "signal.signal(signal.SIGTERM, signal.SIG_IGN); mark(f'deaf{me}'); time.sleep(600)\n"


def script(folder: Path, body: str) -> list[str]:
    (folder / "script.py").write_text(BEGIN + body)
    return [sys.executable, str(folder / "script.py")]


def is_alive(process: int) -> bool:
    """Whether it runs; a zombie, which only its parent can remove, doesn't."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def all_end(processes: list[int], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def marked(folder: Path, pattern: str) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob(pattern))]


def wait_for(folder: Path, *names: str) -> None:
    end = time.monotonic() + 30
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() < end, names
        time.sleep(0.01)


@contextlib.contextmanager
def launcher(folder: Path, *options: str, workers: int = 3) -> Iterator[subprocess.Popen[str]]:
    """The command on `script.py`, as a process of its own that knows Ctrl-C."""
    command = [sys.executable, "-m", "transferkit", "launch", "--workers", str(workers), *options, str(folder / "script.py")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored, and hands that on
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------------- what goes well


def test_every_worker_runs_and_the_chief_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "mark(f'config{me}'); (folder / f'config{me}').write_text(os.environ['TF_CONFIG']); print(f'ö {me} {sys.argv[1:]}')\n"
    logs = tmp_path / "deep" / "logs"
    launched = launch([*script(tmp_path, body), "--x", "1"], workers=3, log_dir=logs, threads=2)
    assert (launched.code, launched.starts, launched.losses, launched.log_dir) == (0, 1, (), str(logs))
    found = [find_cluster({"TF_CONFIG": (tmp_path / f"config{index}").read_text()}) for index in range(3)]
    assert [cluster.index for cluster in found if cluster] == [0, 1, 2]
    assert len({cluster.workers for cluster in found if cluster}) == 1
    said = capfd.readouterr()
    assert said.out == "ö 0 ['--x', '1']\n"
    assert said.err == f"launch: start: 3 workers, TF_NUM_INTRAOP_THREADS=2, OMP_NUM_THREADS=2; logs in {logs}\n"
    title, line = (logs / "worker-2.log").read_text().splitlines()
    assert title.startswith("=== start 1 of worker 2, 20")
    assert line == "ö 2 ['--x', '1']"
    assert str(launched) == f"3 workers, 1 start, {launched.seconds:.1f} s: all ended well\nlogs in {logs}"
    assert json.loads(launched.to_json())["code"] == 0
    assert "3 workers" in launched._repr_html_()


def test_a_temporary_folder_for_logs_goes_when_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert launch(script(tmp_path, ""), workers=1).log_dir is None
    assert not list((tmp_path / "temporary").iterdir())
    launched = launch(script(tmp_path, "sys.exit(3)"), workers=1)
    assert launched.log_dir is not None
    assert (Path(launched.log_dir) / "worker-0.log").exists()


def test_the_command_with_a_module(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text("import sys; print(sys.argv[1:], __name__)")
    command = [sys.executable, "-m", "transferkit", "launch", "--workers", "2", "-m", "training", "--workers", "7", "-h"]
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "['--workers', '7', '-h'] __main__\n"), done.stderr


def test_nobody_reads_the_output(tmp_path: Path) -> None:
    script(tmp_path, "print('x' * 1000)\nwait_for('closed')\nprint('y' * 100_000)\nmark(f'done{me}')\n")
    with launcher(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        (tmp_path / "closed").touch()
        assert process.wait(timeout=60) == 0
    assert len(marked(tmp_path, "done*")) == 3


# --------------------------------------------------------------------------------------------------------- what is lost


def test_the_first_failure_stops_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "if me == 1: print('before'); raise ValueError('the reason')\ntime.sleep(600)\n"
    begin = time.monotonic()
    launched = launch(script(tmp_path, body), workers=3, log_dir=tmp_path)
    assert time.monotonic() - begin < 30
    assert launched.code == 1
    (loss,) = launched.losses
    assert (loss.start, loss.worker, loss.ending, loss.lines[0], loss.lines[-1]) == (
        1,
        1,
        "ended with exit code 1",
        "before",
        "ValueError: the reason",
    )
    said = capfd.readouterr().err.splitlines()
    assert (
        said[1] == f"launch: worker 1 ended with exit code 1 after {loss.seconds:.1f} s; the end of {tmp_path / 'worker-1.log'}:"
    )
    assert said[2] == "    before"
    assert said[-1] == "    ValueError: the reason"
    assert str(launched).splitlines() == [
        f"3 workers, 1 start, {launched.seconds:.1f} s: exit code 1",
        "start  worker  lost by                 after s",
        "─────  ──────  ──────────────────────  ───────",
        f"1      1       ended with exit code 1  {loss.seconds:7.1f}",
        f"logs in {tmp_path}",
    ]
    assert all_end(marked(tmp_path, "begun*"), 0)


def test_a_chief_that_fails_was_heard_already(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launched = launch(script(tmp_path, "if me == 0: sys.exit('the reason')\ntime.sleep(600)"), workers=2, log_dir=tmp_path)
    assert (launched.code, launched.losses[0].worker) == (1, 0)
    said = capfd.readouterr()
    assert said.out == "the reason\n"
    assert (
        said.err.splitlines()[-1]
        == f"launch: worker 0 ended with exit code 1 after {launched.losses[0].seconds:.1f} s; see {tmp_path / 'worker-0.log'}"
    )


def test_workers_that_hang_after_a_death_are_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "if me == 1:\n    wait_for('deaf0', 'deaf2')\n    os.kill(os.getpid(), signal.SIGKILL)\n" + HANG
    begin = time.monotonic()
    launched = launch(script(tmp_path, body), workers=3, grace=0.3, log_dir=tmp_path)
    assert time.monotonic() - begin < 30
    assert (launched.code, launched.losses[0].worker, launched.losses[0].ending) == (137, 1, "was killed by SIGKILL")
    assert "launch: not ended in time, and killed: worker 0, worker 2" in capfd.readouterr().err
    assert all_end(marked(tmp_path, "begun*"), 0)


def test_what_workers_started_ends_with_them(tmp_path: Path) -> None:
    body = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(folder / f'child{me}').write_text(str(child.pid))\n"
        "sys.exit(7 if me == 1 else 0)\n"
    )
    assert launch(script(tmp_path, body), workers=2).code == 7
    assert all_end(marked(tmp_path, "child*"))


def test_restarts_take_up_what_was_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The worker that dies is another one each time, and the ports are new ones."""
    body = (
        "start = len(list(folder.glob(f'ports{me}-*')))\n"
        "(folder / f'ports{me}-{start}').write_text(os.environ['TF_CONFIG'])\n"
        "wait_for(*(f'ports{i}-{start}' for i in range(count)))\n"
        "if start < 2:\n"
        "    if me == start: os.kill(os.getpid(), signal.SIGKILL) if start else sys.exit(9)\n"
        "    time.sleep(600)\n"
        "print('finished', start)\n"
    )
    launched = launch(script(tmp_path, body), workers=2, restarts=3, log_dir=tmp_path / "logs")
    assert (launched.code, launched.starts) == (0, 3)
    assert [(loss.start, loss.worker, loss.code) for loss in launched.losses] == [(1, 0, 9), (2, 1, 137)]
    assert len({path.read_text().partition('"task"')[0] for path in tmp_path.glob("ports*")}) == 3
    said = capfd.readouterr()
    assert said.out == "finished 2\n"
    assert "launch: start 2 of at most 4: 2 workers" in said.err
    titles = [line for line in (tmp_path / "logs" / "worker-1.log").read_text().splitlines() if line.startswith("===")]
    assert [title.partition(",")[0] for title in titles] == [f"=== start {n} of worker 1" for n in (1, 2, 3)]


def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    launched = launch(script(tmp_path, "sys.exit(4 if me else 0)"), workers=2, restarts=2)
    assert (launched.code, launched.starts, len(launched.losses)) == (4, 3, 3)


def test_workers_that_say_nothing_are_taken_for_hung(tmp_path: Path) -> None:
    launched = launch(script(tmp_path, "print(me)\nif me: time.sleep(600)\n"), workers=2, timeout=1.0, log_dir=tmp_path)
    assert launched.code == 124
    (loss,) = launched.losses
    assert (loss.worker, loss.ending) == (None, "no worker wrote a line for 1 s")
    assert 'script.py", line' in (tmp_path / "worker-1.log").read_text()  # where it hung


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 3), (signal.SIGHUP, 75)])
def test_signals_are_passed_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    body = (
        "def leave(code):\n    time.sleep(0.1)\n    mark(f'left{me}')\n    sys.exit(code)\n"
        "signal.signal(signal.SIGTERM, lambda *_: leave(75))\nsignal.signal(signal.SIGINT, lambda *_: leave(3))\n"
        "mark(f'ready{me}')\ntime.sleep(600)\n"
    )
    script(tmp_path, body)
    with launcher(tmp_path, "--restarts", "5") as process:
        wait_for(tmp_path, "ready0", "ready1", "ready2")
        process.send_signal(number)
        assert process.wait(timeout=30) == code  # and no restart
    assert len(marked(tmp_path, "left*")) == 3


def test_signals_that_end_well_and_those_that_are_not_heeded(tmp_path: Path) -> None:
    script(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nmark(f'ready{me}')\ntime.sleep(600)\n")
    with launcher(tmp_path, workers=2) as process:
        wait_for(tmp_path, "ready0", "ready1")
        process.terminate()
        assert process.wait(timeout=30) == 0
    script(tmp_path, HANG)
    with launcher(tmp_path, "--grace", "0.3", workers=2) as process:
        wait_for(tmp_path, "deaf0", "deaf1")
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert all_end(marked(tmp_path, "begun*"), 0)


def test_one_that_left_on_a_signal_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chief ends after its step; the other is in the next one already, which never ends."""
    monkeypatch.setattr("transferkit.launching._AFTER_A_LOSS", 0.3)
    body = f"if me:\n    {HANG}\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nmark('ready')\ntime.sleep(600)\n"
    command = script(tmp_path, body)

    def terminate() -> None:
        wait_for(tmp_path, "ready", "deaf1")
        os.kill(os.getpid(), signal.SIGTERM)

    terminating = threading.Thread(target=terminate)
    terminating.start()
    launched = launch(command, workers=2, restarts=1, grace=500.0)
    terminating.join()
    assert (launched.code, launched.starts) == (75, 1)
    assert [(loss.worker, loss.code) for loss in launched.losses] == [(0, 75)]


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    script(tmp_path, HANG)
    with launcher(tmp_path, "--grace", "500") as process:
        wait_for(tmp_path, "deaf0", "deaf1", "deaf2")
        process.terminate()
        assert process.stderr is not None
        assert "start" in process.stderr.readline()
        assert (
            process.stderr.readline() == "launch: SIGTERM: passed on to the workers, which have 500 s; a second one kills them\n"
        )
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert all_end(marked(tmp_path, "begun*"), 0)


def test_no_orphans_when_the_launcher_is_killed(tmp_path: Path) -> None:
    body = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(folder / f'child{me}').write_text(str(child.pid))\n"
    )
    script(tmp_path, body + HANG)
    with launcher(tmp_path) as process:
        wait_for(tmp_path, *(f"{name}{index}" for name in ("child", "deaf") for index in range(3)))
        processes = [*marked(tmp_path, "begun*"), *marked(tmp_path, "child*")]
        assert len(processes) == 6
        assert all(map(is_alive, processes))
        process.kill()
        assert all_end(processes)


def test_no_orphans_when_the_launcher_is_killed_as_it_starts(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, pathlib, time\n"
        "(pathlib.Path(__file__).parent / f'pid{os.getpid()}').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    for tenth in range(1, 9):
        with launcher(tmp_path, workers=8) as process:
            assert process.stderr is not None
            process.stderr.readline()  # it begins now
            time.sleep(tenth * 0.004)
            process.kill()
    time.sleep(0.2)
    assert all_end(marked(tmp_path, "pid*"))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_can_not_be_launched(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        launch([], workers=0, restarts=-1, threads=0, grace=0.0, timeout=-1.0)
    assert str(caught.value) == (
        "Launching workers.\n"
        "  found 6 problems:\n"
        "    - no command\n"
        "    - workers=0, which isn't a whole number from 1 on\n"
        "    - restarts=-1, which isn't a whole number from 0 on\n"
        "    - threads=0, which isn't a whole number from 1 on\n"
        "    - grace=0.0, which isn't a number of seconds above 0\n"
        "    - timeout=-1.0, which isn't a number of seconds above 0\n"
        "  to fix it: python -m transferkit launch --workers 4 script.py"
    )
    with pytest.raises(PlacementError) as placed:
        launch([str(tmp_path / "nothing")], workers=2, log_dir=tmp_path)
    assert placed.value.found == ("No such file or directory",)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Making the folder for logs"):
        launch(script(tmp_path, ""), workers=2, log_dir=tmp_path / "file")
    (tmp_path / "worker-1.log").unlink()
    (tmp_path / "worker-1.log").mkdir()
    with pytest.raises(StorageError, match=r"worker-1.log: Is a directory"):
        launch(script(tmp_path, ""), workers=2, log_dir=tmp_path)
    command = [sys.executable, "-m", "transferkit", "launch", "--workers", "2", str(tmp_path / "none.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"found: no file '{tmp_path / 'none.py'}'" in done.stderr


def test_threads_and_gpus_are_shared_out() -> None:
    shares, words = _shares({"OMP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "3,GPU-a,1,0"}, 2, None)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["3,GPU-a", "1,0"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"5"}
    assert {int(share["TF_NUM_INTRAOP_THREADS"]) for share in shares} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert words.endswith("OMP_NUM_THREADS=5, GPUs 3,GPU-a | 1,0")
    shares, _ = _shares({"OMP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "0,1"}, 3, 4)
    assert {share["CUDA_VISIBLE_DEVICES"] for share in shares} == {"0,1"}  # too few to share
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"4"}
    assert [share["CUDA_VISIBLE_DEVICES"] for share in _shares({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 2, 1)[0]] == ["0", "1,2"]
    assert _gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == _gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


COLLECTIVES = """
import os, pathlib, signal, sys
import numpy as np
import tensorflow as tf
from transferkit.cluster import find_cluster
from transferkit.meeting import check_in

folder = pathlib.Path(__file__).parent
cluster = check_in(find_cluster())
os.environ["TF_CONFIG"] = cluster.tf_config()
strategy = tf.distribute.MultiWorkerMirroredStrategy()  # listens on the port at which the workers have just met
saved = folder / "saved.npy"
done, total = np.load(saved) if saved.exists() else (0.0, 0.0)
with strategy.scope():
    sum_so_far = tf.Variable(total, dtype=tf.float64)

@tf.function
def step(number):
    def one(number):
        mine = number * (sum_so_far * 0.0 + float(cluster.index + 1))
        sum_so_far.assign_add(tf.distribute.get_replica_context().all_reduce("sum", mine))
    strategy.run(one, args=(number,))

for number in range(int(done) + 1, 21):
    step(tf.constant(float(number), tf.float64))
    if number == 13 and cluster.index == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if cluster.is_chief and number % 5 == 0:
        np.save(folder / "next.npy", (number, sum_so_far.numpy()))
        os.replace(folder / "next.npy", saved)
print("begun at", int(done), "ended with", sum_so_far.numpy(), flush=True)
"""


@pytest.mark.slow
def test_collectives_of_tensorflow_begin_after_the_meeting_and_again_after_a_death(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(COLLECTIVES)
    environ = {**os.environ, "PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": "-1"}
    launched = launch([sys.executable, str(tmp_path / "script.py")], workers=2, restarts=1, grace=2.0, environ=environ)
    said = capfd.readouterr()
    assert (launched.code, launched.starts) == (0, 2), said
    assert [(loss.worker, loss.ending) for loss in launched.losses] == [(1, "was killed by SIGKILL")]
    assert f"begun at 10 ended with {3.0 * sum(range(21))}" in said.out
