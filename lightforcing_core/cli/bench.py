"""`lightforcing bench`: measures attention, whole videos or decoding on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import EXIT_FAILED_CHECK, AddCommand, count, counts, say, write_json

if TYPE_CHECKING:
    from ..bench.case import RolloutCase
    from ..layout import FrameSize
    from ..sparse_settings import SparseSettings

_BENCHES = ("attention", "rollout", "vae")
_DECODERS = ("taehv", "lightvae", "wan", "none")
_SIZES = ("832x480", "768x512")
_WHAT_IT_SAYS = (
    "A rollout makes 81 frames with random weights at the real 1.3B shape, the prompt's embeddings "
    "given. Frames per second 'made' count denoising and clean passes, 'decoded' everything until "
    "the last frame lies on the host; 'first' is when those of the first chunk do. Memory is what "
    "torch holds at the highest point of a warm video: weights, key/value cache, recorded graphs, "
    "decoder and frames; the CUDA context is not counted. Each method has the device to itself."
)
# Options of a rollout; other benches refuse them.
_ROLLOUT_OPTIONS = ("methods", "decoder", "window", "sink", "waterfall", "profile", "plot")


def add_commands(command: AddCommand) -> None:
    """Register `bench`."""
    bench = command("bench", _bench, "Measure attention, whole rollouts or decoding here.")
    bench.epilog = _WHAT_IT_SAYS
    bench.add_argument("what", choices=_BENCHES)
    bench.add_argument("--csv", type=Path, help="write the table")
    bench.add_argument("--runs", type=count, help="measurements of each method")
    bench.add_argument("--device", help="default: cuda where there is one; cpu runs a small size")
    bench.add_argument("--target", type=float, default=0.88, metavar="X", help="sparsity")
    bench.add_argument("--base", type=float, metavar="X", help="limit of the growth")
    bench.add_argument(
        "--size",
        action="append",
        metavar="WIDTHxHEIGHT",
        help="rollout and vae on a GPU; may be given several times "
        f"(default {', '.join(_SIZES)}; for --waterfall and --profile {_SIZES[0]})",
    )
    _add_attention_options(bench.add_argument_group("attention"))
    _add_rollout_options(bench.add_argument_group("rollout"))


def _add_attention_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--query-block", type=count, default=128, help="tokens (default 128)")
    group.add_argument("--key-block", type=count, default=64, help="tokens (default 64)")
    group.add_argument(
        "--frame-tokens", type=count, default=1536, help="default 1536; 1560 is 832x480"
    )
    group.add_argument("--chunks", type=counts, help="chunks to measure, from 0")


def _add_rollout_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--methods",
        metavar="NAME,NAME,...",
        help="only these: 'plain loop', 'dense', 'dense fast', 'sparse', 'sparse fast', "
        "'sparse fp8' (default: all that run here)",
    )
    group.add_argument(
        "--decoder", choices=_DECODERS, help="what decodes every chunk (default: taehv)"
    )
    group.add_argument("--window", type=int, help="latent frames attention sees (default: all)")
    group.add_argument("--sink", type=int, help="of a window, the first ones that stay visible")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--waterfall", action="store_true", help="what each part of the speed preset gains"
    )
    kind.add_argument(
        "--profile",
        action="store_true",
        help="time of each chunk by part; with --methods of that one (default: the fastest here)",
    )
    group.add_argument(
        "--plot", type=Path, metavar="F.png", help="draw the waterfall or the profile"
    )


def _bench(arguments: argparse.Namespace) -> int:
    from ..bench.common import write_csv
    from ..errors import UserError
    from ..memory import usable_device
    from ..outputs import check_output

    given = [name for name in _ROLLOUT_OPTIONS if getattr(arguments, name)]
    if given and arguments.what != "rollout":
        raise UserError(f"--{given[0]} is an option of bench rollout, not of {arguments.what}")
    device = usable_device(arguments.device)
    if arguments.csv is not None:
        check_output(arguments.csv)
    run = {"attention": _bench_attention, "rollout": _bench_rollout, "vae": _bench_vae}
    result = run[arguments.what](arguments, device)
    write_json(arguments.json, result)
    if arguments.csv is not None:
        write_csv(arguments.csv, result["rows"], {"device": result["device"], **result["versions"]})
    say(f"{result['device']}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    for line in _table(arguments, result):
        say(line)
    for name, reason in result.get("left_out", {}).items():
        say(f"not measured: {name}: {reason}")
    failed = result.get("failed", [])
    if failed:
        say(f"wrong: {', '.join(failed)}")
    return EXIT_FAILED_CHECK if failed else 0


def _table(arguments: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    if arguments.waterfall:
        from ..bench.waterfall import waterfall_table

        return waterfall_table(rows)
    if arguments.profile:
        from ..bench.profile import profile_table

        return profile_table(rows)
    if arguments.what == "rollout":
        from ..bench.rollout import rollout_table

        return rollout_table(rows)
    return ["  ".join(f"{key} {value}" for key, value in row.items()) for row in rows]


def _bench_attention(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    from dataclasses import replace

    from ..bench.attention import SMALL, AttentionCase, bench_attention
    from ..schedule import default_base

    case = SMALL
    if device.type == "cuda":
        case = AttentionCase(
            frame_tokens=arguments.frame_tokens,
            query_block=arguments.query_block,
            key_block=arguments.key_block,
        )
    base = default_base(arguments.target) if arguments.base is None else arguments.base
    case = replace(case, target=arguments.target, base=base)
    if arguments.chunks:
        case = replace(case, chunks=arguments.chunks)
    return bench_attention(case, device, arguments.runs or 30)


def _sizes(texts: list[str]) -> list[FrameSize]:
    from ..layout import FrameSize

    return [FrameSize.parse(text) for text in texts]


def _bench_rollout(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    from ..bench.rollout import bench_rollout
    from ..errors import UserError
    from ..sparse_settings import SparseSettings, make_schedule

    methods = [name.strip() for name in (arguments.methods or "").split(",") if name.strip()]
    schedule = make_schedule(arguments.target, base_sparsity=arguments.base)
    sparse, runs = SparseSettings(schedule=schedule), arguments.runs or 3
    cases = _cases(arguments, device)
    if not (arguments.waterfall or arguments.profile):
        if arguments.plot is not None:
            raise UserError("--plot draws a waterfall or a profile; add --waterfall or --profile")
        return bench_rollout(cases, device, sparse, runs, methods)
    if len(cases) != 1:
        raise UserError(f"--waterfall and --profile measure one size, got {len(cases)}")
    if arguments.profile:
        return _profile(arguments, cases[0], device, sparse, methods)
    if methods:
        raise UserError("--waterfall has its own steps; leave --methods out")
    from ..bench.waterfall import bench_waterfall
    from ..bench.waterfall_plot import check_plot, plot_waterfall

    if arguments.plot is not None:
        check_plot(arguments.plot)
    result = bench_waterfall(cases[0], device, sparse, runs)
    if arguments.plot is not None:
        plot_waterfall(result, arguments.plot)
    return result


def _profile(
    arguments: argparse.Namespace,
    case: RolloutCase,
    device: Any,
    sparse: SparseSettings,
    methods: list[str],
) -> dict[str, Any]:
    from ..bench.profile import profile_rollout
    from ..bench.profile_plot import check_picture, plot_profile
    from ..bench.rollout import METHODS, choose_methods, fastest
    from ..errors import UserError

    if len(methods) > 1 or not set(methods) <= set(METHODS):
        raise UserError(
            f"--profile takes one method of {', '.join(METHODS)}, got {arguments.methods}"
        )
    choose_methods(case, device, methods)
    method = methods[0] if methods else fastest(case, device)
    if arguments.plot is not None:
        check_picture(arguments.plot)
    result = profile_rollout(case, device, sparse, method, arguments.runs or 3)
    if arguments.plot is not None:
        size, versions = case.size, result["versions"]
        note = (
            f"{case.frames} frames of {size.width}x{size.height}, decoder {case.decoder}; "
            f"{result['device']}, torch {versions['torch']}"
        )
        title = f"Where the time of a video goes: {method}"
        plot_profile(result["rows"], title, note, arguments.plot)
    return result


def _cases(arguments: argparse.Namespace, device: Any) -> list[RolloutCase]:
    """One for each size; the small one on the CPU."""
    from dataclasses import replace

    from ..bench.case import SMALL, RolloutCase

    one = arguments.waterfall or arguments.profile
    cases = [SMALL]
    if device.type == "cuda":
        sizes = _sizes(arguments.size or [*_SIZES[: 1 if one else None]])
        cases = [RolloutCase(size) for size in sizes]
    changes: dict[str, Any] = {}
    if arguments.window is not None:
        changes["window_frames"] = arguments.window
    if arguments.sink is not None:
        changes["sink_frames"] = arguments.sink
    if arguments.decoder is not None:
        small = device.type != "cuda" and arguments.decoder in ("taehv", "wan")
        changes["decoder"] = arguments.decoder + (" small" if small else "")
    cases = [replace(case, **changes) for case in cases]
    for case in cases:
        case.settings(None)  # refuses a window or sink that cannot be, before anything is built
    return cases


def _bench_vae(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    from ..bench.vae import SMALL, VAECase, bench_vae

    small = device.type != "cuda"
    sizes = _sizes(arguments.size or [*_SIZES])
    cases = [SMALL] if small else [VAECase(size) for size in sizes]
    return bench_vae(cases, device, small=small, repeats=arguments.runs or 5)
