"""`lightforcing inspect` and `convert`: what a checkpoint is, and a clean one."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..outputs import check_output
from .common import AddCommand, add_weights, say, write_json

log = logging.getLogger("lightforcing")


def add_commands(command: AddCommand) -> None:
    """Register `inspect` and `convert`."""
    _add_inspect(
        command("inspect", _inspect, "Say what a checkpoint is and whether it fits this machine.")
    )
    _add_convert(
        command("convert", _convert, "Write any supported checkpoint as clean safetensors.")
    )


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", type=Path, metavar="FILE", help="checkpoint file or folder")
    sub.add_argument("--family", help="of which family the weights are")
    sub.add_argument("--size", help="WIDTHxHEIGHT to plan memory for (default: model's, 832x480)")
    sub.add_argument("--frames", type=int, help="pixel frames to plan for (default: model's, 81)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    sub.add_argument(
        "--header-only", action="store_true", help="do not look for NaN and infinity in the weights"
    )


def _add_convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", type=Path, metavar="FILE", help="checkpoint file or folder")
    sub.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as is")
    add_weights(sub)


def _inspect(arguments: argparse.Namespace) -> int:
    from ..checkpoints.inspect import check_values, inspect_checkpoint, summary
    from ..errors import UserError
    from ..layout import FrameSize
    from ..progress import FileProgress

    inspection = inspect_checkpoint(
        arguments.file,
        family=arguments.family,
        size=FrameSize.parse(arguments.size) if arguments.size is not None else None,
        frames=arguments.frames,
        device=arguments.device,
    )
    problem: UserError | None = None
    try:
        inspection.checkpoint.check_whole()
        if not arguments.header_only:
            with FileProgress(arguments.console, "looking for NaN") as progress:
                check_values(inspection.checkpoint, progress.update)
    except UserError as error:
        problem = error
    write_json(arguments.json, inspection.to_dict() | {"problem": str(problem or "") or None})
    if problem is not None:
        raise problem
    for name, value in summary(inspection):
        say(f"{name:<12} {value}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from ..checkpoints.convert import convert_checkpoint
    from ..checkpoints.lora import load_lora, parse_strength
    from ..progress import FileProgress

    loras = [parse_strength(text) for text in arguments.lora]
    check_output(arguments.out, [path for path, _ in loras])
    with FileProgress(arguments.console, "converting") as progress:
        result = convert_checkpoint(
            arguments.file,
            arguments.out,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            family=arguments.family,
            loras=[(load_lora(path), strength) for path, strength in loras],
            on_progress=progress.update,
        )
    write_json(arguments.json, result.to_dict())
    for note in result.notes:
        log.warning(note)
    say(
        f"{result.out}: {result.tensors} tensors, {result.out_bytes / 2**30:.2f} GiB, "
        f"from {result.format}"
    )
    return 0
