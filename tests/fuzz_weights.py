"""Damages weights files at random and reads them: `python tests/fuzz_weights.py --count 2000 [--format NAME …] [--seed N]`.

Each mutated file is opened and read whole. It must be refused with an error of the library's own, or give what is in it: every
array either as it was written, or with exactly the bytes that now stand in its place, or (where the damage changed what the
file says of shapes, types and names) what the format's own library reads there. No case may take over five seconds, allocate
past the limit, run code, or open another file; the process itself must survive. Prints counts as JSON.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import weights_files as files

from transferkit.errors import TransferKitError
from transferkit.weights.readers import Limits, open_archive

SECONDS = 5
MEMORY = 1 << 30
LIMITS = Limits(max_bytes=64 << 20, max_arrays=10_000, max_metadata_bytes=1 << 20)
WORDS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


class TooLong(Exception):  # noqa: N818  # a signal's news, no error of a library
    """A case took over five seconds."""


class Wrong(Exception):  # noqa: N818  # the harness's finding
    """A tensor isn't what the file holds."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one kind of damage."""
    data = bytearray(content)
    kind = rng.choice(("bit", "bit", "bits", "byte", "word", "word", "cut", "grow", "drop", "double", "swap", "zero"))
    # Structure stands at the beginning and the end of most formats; half of the damage goes there.
    near = rng.random()
    span = min(len(data), 3000)
    at = (
        rng.randrange(span)
        if near < 0.4
        else len(data) - 1 - rng.randrange(min(span, 600))
        if near < 0.6
        else rng.randrange(len(data))
    )
    length = min(rng.choice((1, 4, 8, 16, 64, 300)), len(data) - at)
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(rng.randrange(2, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "word":
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice(WORDS) & ((1 << 8 * width) - 1)
        data[at : at + width] = value.to_bytes(width, "little")[: len(data) - at]
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data[at:at] = rng.randbytes(length)
    elif kind == "drop":
        del data[at : at + length]
    elif kind == "double":
        data[at:at] = data[at : at + length]
    elif kind == "swap":
        other = rng.randrange(len(data) - length + 1)
        first, second = bytes(data[at : at + length]), bytes(data[other : other + length])
        data[at : at + length], data[other : other + length] = second, first
    else:
        data[at : at + length] = bytes(length)
    return bytes(data)


def places(parts: list[bytes], expected: files.Arrays) -> dict[str, tuple[int, int]]:
    """For each array the file it stands in and the offset there; left out where it isn't found in one piece."""
    found = {}
    for name, array in expected.items():
        raw = array.tobytes()
        for number, content in enumerate(parts):
            if content.count(raw) == 1:
                found[name] = (number, content.index(raw))
    return found


def by_other_reader(path: Path, names: list[str], form: str) -> dict[str, str]:
    """The SHA-256 of arrays as the format's own library reads them, in a process that may crash; without those it refuses."""
    opening = {"h5": "import h5py; f = h5py.File(sys.argv[1])", "npz": "f = numpy.load(sys.argv[1])"}.get(form)
    if opening is None:
        return {}
    program = (
        f"import hashlib, json, numpy, sys\n{opening}\nfound = {{}}\n"
        "for name in sys.argv[2:]:\n"
        "    try:\n"
        "        found[name] = hashlib.sha256(numpy.ascontiguousarray(f[name][()]).tobytes()).hexdigest()\n"
        "    except Exception:\n"
        "        pass\n"
        "print(json.dumps(found))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program, str(path), *names], capture_output=True, timeout=60, check=False)
    except (subprocess.TimeoutExpired, ValueError):  # a name with a zero byte can't be an argument
        return {}
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def inside_h5(name: str) -> list[str]:
    """Where an array of a legacy file may stand in it."""
    layer, _, variable = name.partition("/")
    roots = ("model_weights/", "")
    return [name, *(f"{root}{layer}/{layer}/{variable}:0" for root in roots), *(f"{root}{layer}/{variable}:0" for root in roots)]


def judge(
    path: Path, parts: list[bytes], where: dict[str, tuple[int, int]], expected: files.Arrays
) -> tuple[str, dict[str, str]]:
    """Opens and reads one file: `refused`, `same`, `as stored` (the changed bytes) or `as told` (what the file says now).

    Of the last kind also the SHA-256 of each array.
    """
    outcome, told = "same", {}
    try:
        with open_archive(path, limits=LIMITS) as archive:
            for name, info in archive.arrays.items():
                read = archive.read(name)
                if read.shape != info.shape or read.dtype != info.dtype:
                    raise Wrong(f"{name}: {read.dtype} {read.shape} in place of {info.dtype} {info.shape}")
                original = expected.get(name)
                if original is not None and original.shape == read.shape:
                    if original.tobytes() == read.tobytes():
                        continue
                    if name in where:
                        number, offset = where[name]
                        if read.tobytes() == parts[number][offset : offset + read.nbytes]:
                            outcome = "as stored" if outcome == "same" else outcome
                            continue
                outcome = "as told"
                told[name] = hashlib.sha256(np.ascontiguousarray(read).tobytes()).hexdigest()
    except TransferKitError as error:
        if "makes no sense" in error.found[0]:  # the net under the readers caught what they should have
            raise Wrong(str(error)) from error
        return "refused", {}
    return outcome, told


def compared(path: Path, form: str, told: dict[str, str]) -> None:
    """Raises `Wrong` where the format's own library reads something else."""
    names = {name: inside_h5(name) if form == "h5" else [name] for name in told}
    others = by_other_reader(path, [place for places_of in names.values() for place in places_of], form)
    for name, places_of in names.items():
        found = [others[place] for place in places_of if place in others]
        if found and told[name] not in found:
            raise Wrong(f"{name} isn't what the format's own library reads")


FORMS = {"legacy_h5": "h5", "compressed_h5": "h5", "weights_h5": "h5", "npz": "npz", "npz_deflated": "npz"}


def fuzz(name: str, count: int, seed: int, *, strict: bool = False) -> dict[str, Any]:
    """Reads `count` mutated files of a format and counts what came of it; each entry of `failed` is a defect."""
    rng = random.Random(f"{seed} {name}")
    counts: collections.Counter[str] = collections.Counter()
    failed: list[str] = []
    slowest = 0.0
    folder = Path(tempfile.mkdtemp())
    try:
        path, expected = files.WRITERS[name](folder)
        others = sorted(p for p in folder.iterdir() if p.is_file())
        original = {p: p.read_bytes() for p in others}
        for number in range(count):
            victim = rng.choice([p for p in others if p.suffix != ".bin"]) if rng.random() < 0.7 else rng.choice(others)
            changed = mutated(original[victim], rng)
            victim.write_bytes(changed)
            parts = [changed if p == victim else original[p] for p in others]
            where = places([original[p] for p in others], expected)
            begin = time.process_time()
            signal.alarm(4 * SECONDS)  # of the clock: other programs may be running
            try:
                outcome, told = judge(path, parts, where, expected)
                signal.alarm(0)
                taken = time.process_time() - begin
                slowest = max(slowest, taken)
                counts[outcome] += 1
                if taken > SECONDS:
                    failed.append(f"{number}: {taken:.1f} seconds")
                if strict and told:
                    compared(path, FORMS.get(name, ""), told)
            except TooLong:
                failed.append(f"{number}: it hangs")
            except Exception as error:
                failed.append(f"{number}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
            if failed and failed[-1].startswith(f"{number}:"):
                keep = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{number}{victim.suffix}"
                keep.write_bytes(changed)
            victim.write_bytes(original[victim])
    finally:
        shutil.rmtree(folder)
    return {"format": name, "count": count, **counts, "failed": failed, "slowest_seconds": round(slowest, 3)}


def watched(allowed: str) -> list[str]:
    """Starts an audit hook; the list it gives fills with what no reader may do."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.system", "os.exec", "socket.connect"):
            seen.append(f"{event} {arguments[0]}")
        elif event == "open" and isinstance(arguments[0], str):
            name = arguments[0]
            if not name.startswith(
                (allowed, sys.prefix, sys.base_prefix, "/usr", "/dev/null", *(place for place in sys.path if place))
            ):
                seen.append(f"open {name}")

    sys.addaudithook(hook)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", choices=list(files.WRITERS))
    parser.add_argument("--strict", action="store_true", help="ask the format's own library what a changed file holds")
    chosen = parser.parse_args()

    def late(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    seen = watched(tempfile.gettempdir())
    results = [fuzz(name, chosen.count, chosen.seed, strict=chosen.strict) for name in chosen.format or files.WRITERS]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"results": results, "foreign": sorted(set(seen)), "peak_MiB": peak}, indent=1))
    return 1 if seen or any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
