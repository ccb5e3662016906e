"""The `lightforcing` command.

Exit status: 0 success, 1 a check failed, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import Cancelled, UserError
from ..outputs import check_output
from . import bench, checkpoints, checks, generate, sparse
from .common import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Parser, complain, set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be printable
    arguments = _parser().parse_args(argv)
    # Before torch loads OpenMP: threads that spin for long while another program has the core make
    # a run on a busy machine more than ten times slower. Short spinning costs nothing otherwise.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments.console = set_up_logging(arguments.verbose)
    try:
        if arguments.json is not None:
            check_output(arguments.json, _files_of(arguments))
        return arguments.run(arguments)
    except UserError as error:
        complain(str(error))
        return EXIT_BAD_INPUT
    except (Cancelled, KeyboardInterrupt) as error:
        complain(str(error) or "interrupted")
        return EXIT_INTERRUPTED


def _files_of(arguments: argparse.Namespace) -> list[Path]:
    """Every file the command line names, but for --json itself."""
    values = [v for k, v in vars(arguments).items() if k != "json"]
    flat = [item for v in values for item in (v if isinstance(v, list) else [v])]
    # A LoRA is FILE or FILE:STRENGTH; both readings of it are somebody's file.
    loras = getattr(arguments, "lora", [])
    named = [Path(part) for text in loras for part in (text, text.rpartition(":")[0]) if part]
    return [*(item for item in flat if isinstance(item, Path)), *named]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightforcing",
        description="Autoregressive Wan video, chunk by chunk.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
        sub.add_argument("--verbose", action="store_true", help="log what is loaded and chosen")
        return sub

    for room in (generate, checkpoints, sparse, bench, checks):
        room.add_commands(command)
    return parser
