"""The subcommands of `python -m transferkit`. Each adds its arguments to a parser and gives the exit code when run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable

import transferkit
from transferkit.errors import PlanError
from transferkit.weights.inspection import inspect_weights

__all__ = ["add_convert", "add_inspect", "add_launch", "add_match"]


def add_inspect(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `inspect FILE`, which prints what a weights file holds."""
    parser = subcommands.add_parser("inspect", help="print what a weights file holds")
    parser.add_argument("file", help="any weights file, or the directory of a checkpoint or SavedModel")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--check", action="store_true", help="read every array too, which finds damage and numbers that aren't finite"
    )
    parser.add_argument("--sha256", metavar="DIGITS", help="the expected SHA-256 of the file")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    contents = inspect_weights(arguments.file, check=arguments.check, sha256=arguments.sha256)
    print(json.dumps(contents.to_dict(), indent=1) if arguments.json else str(contents))
    return 1 if contents.not_finite else 0


def add_match(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `match FILE MODEL`, which prints what loading a weights file into a saved model would do."""
    parser = subcommands.add_parser("match", help="print what loading a weights file into a model would do; changes nothing")
    parser.add_argument("file", help="any weights file")
    parser.add_argument("model", help="a Keras file that holds a whole model")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="these variables of the model alone")
    parser.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these out")
    parser.add_argument(
        "--rename", action="append", default=[], nargs=2, metavar=("REGEX", "NEW"), help="rename the file's arrays"
    )
    parser.add_argument("--map", action="append", default=[], metavar="MODEL=FILE", help="which array a variable takes")
    parser.add_argument("--layout", choices=("keras", "tensorflow", "theano", "torch"), help="how the file stores kernels")
    parser.add_argument("--channels", choices=("auto", "sum", "repeat", "zero"), help="fit another number of input channels")
    parser.add_argument("--by-order", action="store_true", help="also match layers by their order alone")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--sha256", metavar="DIGITS", help="the expected SHA-256 of the file")
    parser.set_defaults(run=_match)


def _match(arguments: argparse.Namespace) -> int:
    # Both names bring TensorFlow, so they come on first use: `inspect` and `convert` never wait for it.
    plan = transferkit.WeightLoader(arguments.file)
    plan = plan.only(*arguments.only) if arguments.only else plan
    plan = plan.skip(*arguments.skip) if arguments.skip else plan
    for pattern, new in arguments.rename:
        plan = plan.rename(pattern, new)
    for pair in arguments.map:
        target, sign, source = pair.partition("=")
        if not sign:
            raise PlanError("Reading --map.", found=f"{pair!r}", fix="--map head=fc, the model's name first")
        plan = plan.map({target: source})
    plan = plan.layout(arguments.layout) if arguments.layout else plan
    plan = plan.channels(arguments.channels) if arguments.channels else plan
    plan = plan.by_order() if arguments.by_order else plan
    plan = plan.sha256(arguments.sha256) if arguments.sha256 else plan
    opening = importlib.import_module("transferkit.building.opening")
    report = plan.match(opening.open_model(arguments.model))
    print(report.to_json() if arguments.json else str(report))
    return 0 if report.ok else 1


def add_convert(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `convert IN OUT`, which writes the arrays of one weights file to a file of another format."""
    parser = subcommands.add_parser("convert", help="write a weights file in another format")
    parser.add_argument("source", metavar="IN", help="any weights file")
    parser.add_argument("target", metavar="OUT", help="the file to write: .safetensors, .npz or legacy .h5")
    parser.add_argument("--sha256", metavar="DIGITS", help="the expected SHA-256 of IN")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    writing = importlib.import_module("transferkit.weights.writing")  # h5py, which `inspect` does without
    written = writing.convert_weights(arguments.source, arguments.target, sha256=arguments.sha256, progress=_progress())
    print(written)
    return 0


def add_launch(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `launch --workers N SCRIPT …`, which runs a script as several workers of this machine."""
    parser = subcommands.add_parser(
        "launch",
        help="run a training script as several workers of this machine",
        usage="python -m transferkit launch --workers N [options] script.py …",
        description="Runs a script as several workers of this machine, which find each other by TF_CONFIG. Shows what worker 0 "
        "prints; the first that fails stops all. The exit code is 0, or that of the worker that failed (128 + the signal that "
        "killed it, 124 when all hung).",
    )
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="how many processes")
    parser.add_argument("--restarts", type=int, default=0, metavar="K", help="start all anew so often when one is lost")
    parser.add_argument("--log-dir", metavar="DIR", help="where worker-0.log … go; a temporary folder unless given")
    parser.add_argument(
        "--threads", type=int, metavar="T", help="threads for computing in each worker; the processors' number / N unless given"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds from Ctrl-C or SIGTERM until workers are killed (30)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="take the workers for hung when none writes for so many seconds"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="the script, which takes all that follows")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="the script's arguments")
    parser.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    if not arguments.module and not os.path.isfile(arguments.script):
        raise PlanError("Launching a script.", found=f"no file {arguments.script!r}", fix="give its path after the options")
    launching = importlib.import_module("transferkit.launching")  # sockets and processes, which the others do without
    launched = launching.launch(
        [sys.executable, *(["-m"] if arguments.module else []), arguments.script, *arguments.arguments],
        workers=arguments.workers,
        restarts=arguments.restarts,
        log_dir=arguments.log_dir,
        threads=arguments.threads,
        grace=arguments.grace,
        timeout=arguments.timeout,
    )
    print(launched, file=sys.stderr)
    return int(launched.code)


def _progress() -> Callable[[int, int], None]:
    """A bar on a terminal's standard error, once a job has taken half a second."""
    begin = time.monotonic()
    shown = [-1]

    def show(done: int, total: int) -> None:
        if not sys.stderr.isatty() or time.monotonic() - begin < 0.5 or not total:
            return
        percent = 100 * done // total
        if percent != shown[0]:
            shown[0] = percent
            bar = "█" * (percent // 4)
            print(f"\r{bar:<25} {percent:3d}%", end="" if done < total else "\n", file=sys.stderr, flush=True)

    return show
