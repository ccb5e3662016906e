"""`lightforcing verify` and `doctor`: does it compute what it should, and what runs here."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import EXIT_FAILED_CHECK, AddCommand, say, write_json


def add_commands(command: AddCommand) -> None:
    """Register `verify` and `doctor`."""
    verify = command("verify", _verify, "Recompute golden files of the published implementations.")
    verify.add_argument("files", nargs="+", type=Path, metavar="FILE")
    verify.add_argument(
        "--write", type=Path, metavar="OUT", help="store what was computed as safetensors"
    )
    command("doctor", _doctor, "Show what this machine can run, and why not the rest.")


def _verify(arguments: argparse.Namespace) -> int:
    from ..verify import TOLERANCE, results_to_json, verify_files

    results = verify_files(arguments.files, arguments.write)
    write_json(arguments.json, results_to_json(results))
    for result in results:
        error = "nothing to compare with" if result.rel_err is None else f"{result.rel_err:.2e}"
        mark = "ok  " if result.passed else "FAIL"
        detail = f" ({result.detail})" if result.detail else ""
        say(f"{mark} {result.file} {result.case}: relative error {error}{detail}")
    failed = sum(not result.passed for result in results)
    say(f"{len(results) - failed} of {len(results)} cases within {TOLERANCE:g}")
    return EXIT_FAILED_CHECK if failed else 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ..doctor import examine

    report = examine()
    write_json(arguments.json, report)
    say("versions")
    for name, version in report["versions"].items():
        say(f"  {name:<16} {version or 'not installed'}")
    say("devices")
    for device in report["devices"]:
        facts = ", ".join(f"{k} {v}" for k, v in device.items() if k != "name")
        say(f"  {device['name']:<16} {facts}")
    say("backends")
    for backend in report["backends"]:
        say(f"  {'yes' if backend['available'] else 'no ':<4}{backend['name']}")
        say(f"       {backend['reason']}")
    return 0
