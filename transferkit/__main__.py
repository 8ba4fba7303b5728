"""`python -m transferkit COMMAND …`: reads the command line and hands over to a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transferkit.commands import add_convert, add_inspect, add_launch, add_match
from transferkit.errors import TransferKitError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and gives its exit code: 0 done, 1 something was found wrong, 2 the call or the file is bad.

    `launch` gives that of the workers.
    """
    parser = argparse.ArgumentParser(prog="python -m transferkit", description="Transfer learning on tf.keras.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_inspect, add_match, add_convert, add_launch):
        add(subcommands)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
    except TransferKitError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        sys.stderr.close()
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
