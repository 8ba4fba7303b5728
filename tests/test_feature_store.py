"""The folder of kept features: whole or not there, whatever happens to the processes that write it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from transferkit.errors import StorageError
from transferkit.tuning.feature_store import FeatureStore


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    code = f"""
        import os
        from transferkit.tuning.feature_store import FeatureStore
        import numpy as np
        store = FeatureStore({str(tmp_path)!r})
        with store.writer(1) as writer:
            writer.append([np.ones(1000)])
            os.kill(os.getpid(), 9)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False
    )
    assert ended.returncode == -9
    assert len(list(tmp_path.glob(".transferkit-*.tmp"))) == 1
    store = FeatureStore(tmp_path)
    assert not list(tmp_path.glob(".transferkit-*.tmp"))
    with store.writer(1) as writer:  # one that lives is left alone
        FeatureStore(tmp_path)
        assert writer.folder.is_dir()
    assert not list(tmp_path.glob(".transferkit-*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_a_folder_that_everyone_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StorageError) as caught:
        FeatureStore(folder)
    assert str(caught.value) == (
        f"Keeping features in {str(folder)!r}.\n"
        "  found: everyone may write to it\n"
        "  likely cause: whoever can write there can change what the model is trained on\n"
        "  to fix it: name a folder of your own, or take the right away: chmod o-w"
    )


def _within(limit: str, used: str, code: str) -> None:
    """Runs code in a process that may use 16 MiB more than it does."""
    begun = f"""
        import resource
        import numpy as np
        from transferkit.errors import StorageError
        from transferkit.tuning.feature_store import FeatureStore
        used = next(line for line in open("/proc/self/status") if line.startswith("{used}"))
        resource.setrlimit(resource.{limit}, ((int(used.split()[1]) << 10) + (16 << 20),) * 2)
    """
    command = [sys.executable, "-c", textwrap.dedent(begun) + textwrap.dedent(code)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a limit on memory that holds")
def test_features_on_disk_count_against_no_limit_on_data(tmp_path: Path) -> None:
    code = f"""
        store = FeatureStore({str(tmp_path)!r})
        with store.writer(1) as writer:
            for _ in range(64):
                writer.append([np.ones(1 << 20, "uint8")])
            kept = store.keep(writer, "run").files[0]
        found = store.open("run").files[0]
        assert len(kept) == len(found) == 64 << 20 and kept.all() and found.all()
    """
    _within("RLIMIT_DATA", "VmData", code)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a limit on memory that holds")
def test_features_there_is_no_room_for_stay_where_they_are(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writer(1) as writer:
        for _ in range(64):
            writer.append([np.ones(1 << 20, "uint8")])
        store.keep(writer, "run")
    code = f"""
        try:
            FeatureStore({str(tmp_path)!r}).open("run")
        except StorageError as error:
            assert str(error) == (
                "Reading features from {str(tmp_path)!r}.\\n"
                "  found: no room to map a file of 67,108,864 bytes; the features are kept and whole\\n"
                "  likely cause: a limit on what the process may address (ulimit -v, RLIMIT_AS)\\n"
                '  to fix it: raise the limit, or keep features smaller: .cache("folder", dtype="float16")'
            ), str(error)
        else:
            raise AssertionError("it was read")
    """
    _within("RLIMIT_AS", "VmSize", code)
    entry = store.open("run")
    assert entry is not None
    assert entry.files[0].all()


@pytest.mark.slow
def test_processes_that_write_and_die_never_leave_a_wrong_feature(tmp_path: Path) -> None:
    """Eight processes over one folder for fifty rounds each, a hundred killed while they write; nothing wrong is found."""
    code = f"""
        import sys, numpy as np
        from transferkit.tuning.feature_store import FeatureStore
        store = FeatureStore({str(tmp_path)!r})
        random = np.random.default_rng(int(sys.argv[1]))
        for turn in range(50):
            key = f"{{random.integers(0, 4):064d}}"
            wanted = np.random.default_rng(int(key)).integers(0, 255, 200_000).astype("uint8")
            with store.lock(key[:32]):
                entry = store.open(key)
                if entry is None or random.random() < 0.3:
                    with store.writer(1) as writer:
                        for piece in np.split(wanted, 20):
                            writer.append([piece])
                            if random.random() < 0.05:
                                print("writing", flush=True)
                        entry = store.keep(writer, key)
            assert np.array_equal(entry.files[0], wanted), key
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def started(number: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    random = np.random.default_rng(0)
    running = [started(number) for number in range(8)]
    kills = rounds = 0
    while kills < 100:
        for place, process in enumerate(running):
            assert process.stdout is not None
            for _ in range(random.integers(1, 5)):
                if not process.stdout.readline():  # it came to its end
                    break
            else:
                process.kill()
                kills += 1
            _, said = process.communicate()
            assert process.returncode in (0, -9), said.decode()
            rounds += process.returncode == 0
            running[place] = started(8 + kills + rounds)
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
    store = FeatureStore(tmp_path)
    for number in range(4):
        key = f"{number:064d}"
        entry = store.open(key)
        assert entry is not None
        assert np.array_equal(entry.files[0], np.random.default_rng(number).integers(0, 255, 200_000).astype("uint8"))
    assert not list(tmp_path.glob(".transferkit-*.tmp"))
    print(f"{kills} killed, {rounds + len(running)} came to their end after 50 rounds")
