"""What every subcommand shares: output, errors, progress-friendly logging, stopping."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler

from ..outputs import replacing

EXIT_FAILED_CHECK = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# Makes a subcommand: its name, what it runs, its help.
AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def complain(message: str) -> None:
    sys.stderr.write(f"lightforcing: {' '.join(message.split())}\n")


def say(message: str) -> None:
    try:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader that left (`lightforcing doctor | head`) changes nothing about the result.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def set_up_logging(verbose: bool) -> Console:
    """Log to stderr; the console returned is the one a progress bar must share with the log."""
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("lightforcing")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    return console


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, got '{text}'"
        ) from error


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got '{text}'")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 0 up, separated by commas."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers separated by commas, got '{text}'"
        )
    return tuple(map(int, parts))


class Parser(argparse.ArgumentParser):
    """Complains in one line, like every other bad input; --help has the usage."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see {self.prog} --help")
        raise SystemExit(EXIT_BAD_INPUT)


def add_weights(group: argparse._ActionsContainer) -> None:
    """Options that say more about a checkpoint than its tensors do."""
    group.add_argument("--family", help="family of the weights, where the file does not say")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merge a LoRA into the weights; may be given several times",
    )


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a stop between two forwards; a second one acts
    at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> StopRequest:
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
