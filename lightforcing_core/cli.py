"""The `lightforcing` command.

Exit status: 0 success, 1 a check failed, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler

from .errors import Cancelled, UserError
from .outputs import check_output, replacing

EXIT_FAILED_CHECK = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be printable
    arguments = _parser().parse_args(argv)
    # Before torch loads OpenMP: threads that spin for long while another program has the core make
    # a run on a busy machine more than ten times slower. Short spinning costs nothing otherwise.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments.console = _set_up_logging(arguments.verbose)
    try:
        if arguments.json is not None:
            check_output(arguments.json, _files_of(arguments))
        return arguments.run(arguments)
    except UserError as error:
        _complain(str(error))
        return EXIT_BAD_INPUT
    except (Cancelled, KeyboardInterrupt) as error:
        _complain(str(error) or "interrupted")
        return EXIT_INTERRUPTED


def _complain(message: str) -> None:
    sys.stderr.write(f"lightforcing: {' '.join(message.split())}\n")


def _say(message: str) -> None:
    try:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader that left (`lightforcing doctor | head`) changes nothing about the result.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _files_of(arguments: argparse.Namespace) -> list[Path]:
    """Every file the command line names, but for --json itself."""
    values = [v for k, v in vars(arguments).items() if k != "json"]
    flat = [item for v in values for item in (v if isinstance(v, list) else [v])]
    return [item for item in flat if isinstance(item, Path)]


def _set_up_logging(verbose: bool) -> Console:
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


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, got '{text}'"
        ) from error


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like every other bad input; --help has the usage."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message}; see {self.prog} --help")
        raise SystemExit(EXIT_BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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

    _add_generate(command("generate", _generate, "Make a video from a prompt."))
    verify = command("verify", _verify, "Recompute golden files of the published implementations.")
    verify.add_argument("files", nargs="+", type=Path, metavar="FILE")
    verify.add_argument(
        "--write", type=Path, metavar="OUT", help="store what was computed as safetensors"
    )
    _add_inspect(
        command("inspect", _inspect, "Say what a checkpoint is and whether it fits this machine.")
    )
    _add_convert(
        command("convert", _convert, "Write any supported checkpoint as clean safetensors.")
    )
    command("doctor", _doctor, "Show what this machine can run, and why not the rest.")
    return parser


def _add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompt", required=True, help="what to show")
    sub.add_argument("--out", required=True, type=Path, metavar="FILE.mp4", help="where to")
    files = sub.add_argument_group("model files (default: the embedded model)")
    files.add_argument("--model", type=Path, help="autoregressive Wan checkpoint")
    files.add_argument("--vae", type=Path, help="Wan 2.1 VAE, LightVAE or TAEHV file")
    files.add_argument("--text-encoder", type=Path, help="UMT5 file or folder")
    files.add_argument(
        "--vae-latents",
        choices=("normalised", "denormalised"),
        help="what a TAEHV file takes: normalised (taew2_1) or denormalised (lighttaew2_1)",
    )
    _add_weights(files)
    video = sub.add_argument_group("video")
    video.add_argument("--frames", type=int, help="pixel frames, 4k + 1 (default: model's, 81)")
    video.add_argument("--size", help="WIDTHxHEIGHT in pixels, multiples of 16")
    video.add_argument("--seed", type=int, default=0, help="same seed, same video (default 0)")
    video.add_argument("--image", type=Path, help="picture the video starts from")
    sampling = sub.add_argument_group("sampling (default: what the model's file says)")
    sampling.add_argument(
        "--steps", type=_numbers, metavar="T,T,...", help="timesteps, 1000 is noise"
    )
    sampling.add_argument(
        "--first-steps", type=_numbers, metavar="T,T,...", help="timesteps of the first chunk"
    )
    sampling.add_argument(
        "--shift", type=float, help="shift of the suggested timesteps (Self Forcing: 5)"
    )
    sampling.add_argument(
        "--clean-timestep",
        type=float,
        metavar="T",
        help="noise level at which a finished chunk is written to the cache (all published: 0)",
    )
    sampling.add_argument("--chunk", type=int, help="latent frames per chunk")
    sampling.add_argument(
        "--window", type=int, help="latent frames attention sees; -1 for the whole history"
    )
    sampling.add_argument("--sink", type=int, help="first latent frames kept in the window")
    sampling.add_argument(
        "--dense", action="store_true", help="attend to every visible key (the default)"
    )
    machine = sub.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))


def _add_weights(group: argparse._ActionsContainer) -> None:
    """Options that say more about a checkpoint than its tensors do."""
    group.add_argument("--family", help="family of the weights, where the file does not say")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merge a LoRA into the weights; may be given several times",
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
    _add_weights(sub)


def _generate(arguments: argparse.Namespace) -> int:
    # Late: torch takes seconds to import, and --help should not.
    import torch

    from .checkpoints.lora import parse_strength
    from .generate import GenerateRequest, generate
    from .layout import FrameSize
    from .progress import ChunkProgress

    request = GenerateRequest(
        prompt=arguments.prompt,
        out=arguments.out,
        model=arguments.model,
        vae=arguments.vae,
        text_encoder=arguments.text_encoder,
        vae_latents=arguments.vae_latents,
        family=arguments.family,
        loras=[parse_strength(text) for text in arguments.lora],
        frames=arguments.frames,
        size=FrameSize.parse(arguments.size) if arguments.size is not None else None,
        seed=arguments.seed,
        start_image=arguments.image,
        steps=arguments.steps,
        first_chunk_steps=arguments.first_steps,
        shift=arguments.shift,
        context_timestep=arguments.clean_timestep,
        frames_per_chunk=arguments.chunk,
        window_frames=arguments.window,
        sink_frames=arguments.sink,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
    )
    with _StopRequest() as stop, ChunkProgress(arguments.console) as progress:
        result = generate(
            request, on_load=progress.loading, on_chunk=progress.update, should_stop=stop.asked
        )
    _write_json(arguments.json, result.to_dict())
    _say(
        f"{result.out}: {result.frames} frames of {result.size.width}x{result.size.height} in "
        f"{result.seconds:.1f} s ({result.frames / result.seconds:.1f} frames/s with decoding, "
        f"{result.device}, {str(result.dtype).removeprefix('torch.')})"
    )
    return 0


class _StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a stop between two forwards; a second one acts
    at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> _StopRequest:
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


def _verify(arguments: argparse.Namespace) -> int:
    from .verify import TOLERANCE, results_to_json, verify_files

    results = verify_files(arguments.files, arguments.write)
    _write_json(arguments.json, results_to_json(results))
    for result in results:
        error = "nothing to compare with" if result.rel_err is None else f"{result.rel_err:.2e}"
        mark = "ok  " if result.passed else "FAIL"
        _say(f"{mark} {result.file} {result.case}: relative error {error}")
    failed = sum(not result.passed for result in results)
    _say(f"{len(results) - failed} of {len(results)} cases within {TOLERANCE:g}")
    return EXIT_FAILED_CHECK if failed else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoints.inspect import check_values, inspect_checkpoint, summary
    from .layout import FrameSize
    from .progress import FileProgress

    inspection = inspect_checkpoint(
        arguments.file,
        family=arguments.family,
        size=FrameSize.parse(arguments.size) if arguments.size is not None else None,
        frames=arguments.frames,
        device=arguments.device,
    )
    _write_json(arguments.json, inspection.to_dict())
    inspection.checkpoint.check_whole()
    if not arguments.header_only:
        with FileProgress(arguments.console, "looking for NaN") as progress:
            check_values(inspection.checkpoint, progress.update)
    for name, value in summary(inspection):
        _say(f"{name:<12} {value}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from .checkpoints.convert import convert_checkpoint
    from .checkpoints.lora import load_lora, parse_strength
    from .progress import FileProgress

    loras = [parse_strength(text) for text in arguments.lora]
    with FileProgress(arguments.console, "converting") as progress:
        result = convert_checkpoint(
            arguments.file,
            arguments.out,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            family=arguments.family,
            loras=[(load_lora(path), strength) for path, strength in loras],
            on_progress=progress.update,
        )
    _write_json(arguments.json, result.to_dict())
    _say(
        f"{result.out}: {result.tensors} tensors, {result.out_bytes / 2**30:.2f} GiB, "
        f"from {result.format}"
    )
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    report = examine()
    _write_json(arguments.json, report)
    _say("versions")
    for name, version in report["versions"].items():
        _say(f"  {name:<16} {version or 'not installed'}")
    _say("devices")
    for device in report["devices"]:
        facts = ", ".join(f"{k} {v}" for k, v in device.items() if k != "name")
        _say(f"  {device['name']:<16} {facts}")
    _say("backends")
    for backend in report["backends"]:
        _say(f"  {'yes' if backend['available'] else 'no ':<4}{backend['name']}")
        _say(f"       {backend['reason']}")
    return 0
