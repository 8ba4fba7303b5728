"""The subcommands of `python -m transferkit`. Each adds its arguments to a parser and gives the exit code when run."""

from __future__ import annotations

import argparse
import json

from transferkit.weights.inspection import inspect_weights

__all__ = ["add_convert", "add_inspect", "add_match"]


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
