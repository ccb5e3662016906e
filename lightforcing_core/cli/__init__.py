"""The `lightforcing` command: a module for each group of subcommands."""

from .main import main

__all__ = ["main"]
