"""The command line: ``python -m lowrank_nn inspect FILE``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage import inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, those of the process by default.

    Returns:
        The exit status: 0, or 1 with a line on the standard error stream where the file is damaged or missing.
    """
    parser = argparse.ArgumentParser(prog="python -m lowrank_nn")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="print what is inside a file that lowrank_nn.save wrote")
    command.add_argument("file")
    command.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    try:
        summary = inspect(options.file)
    except (FileFormatError, OSError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    text = json.dumps(summary.to_dict(), indent=1) if options.json else str(summary)
    encoding = sys.stdout.encoding or "utf-8"  # of which a terminal or a pipe may have few characters
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
