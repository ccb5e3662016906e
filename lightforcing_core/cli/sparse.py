"""`lightforcing schedule` and `compile-kernels`, and the options of sparse attention."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import EXIT_FAILED_CHECK, AddCommand, numbers, say, write_json

if TYPE_CHECKING:
    from ..sparse_settings import SparseSettings

# Options of `generate` that say how attention is sparse, but not that it is.
_SPARSE_OPTIONS = (
    "base_sparsity", "schedule", "policy", "keep_frames", "keep_sink", "keep_near",
    "guarantee_sink", "guarantee_own_block", "query_block", "key_block", "token_order", "plan",
    "qk_precision", "backend",
)  # fmt: skip


def add_commands(command: AddCommand) -> None:
    """Register `schedule` and `compile-kernels`."""
    schedule = command("schedule", _schedule, "Print the sparsity of every chunk; --plot draws it.")
    schedule.add_argument("--frames", type=int, default=21, help="latent frames (default 21)")
    schedule.add_argument("--chunk", type=int, default=3, help="latent frames per chunk")
    schedule.add_argument("--window", type=int, default=-1, help="latent frames attention sees")
    schedule.add_argument(
        "--target", type=float, help="sparsity of equal cost (default 0.88)", metavar="X"
    )
    schedule.add_argument("--base", type=float, help="limit of the growth", metavar="X")
    add_schedule_kind(schedule)
    schedule.add_argument("--frame-tokens", type=int, default=1536, help="tokens a latent frame")
    schedule.add_argument("--block", type=int, default=64, help="tokens a key block")
    schedule.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curve")

    compiling = command(
        "compile-kernels", _compile, "Compile every kernel for GPUs that need not be here."
    )
    compiling.add_argument(
        "--arch", default="80,86,89,90,100,120", help="compute capabilities without the dot"
    )


def add_schedule_kind(group: argparse._ActionsContainer) -> None:
    """Which curve, and its points."""
    group.add_argument(
        "--schedule",
        choices=("chunk_aware", "uniform", "linear", "hand_drawn"),
        help="curve of the sparsity over chunks (default: chunk_aware, the paper's)",
    )
    group.add_argument(
        "--schedule-values", type=numbers, default=(), metavar="S,S,...", help="of a hand-drawn one"
    )


def add_sparse_options(parser: argparse.ArgumentParser) -> None:
    """Options of `generate` that make attention sparse."""
    group = parser.add_argument_group("sparse attention (off unless --sparsity is given)")
    group.add_argument(
        "--sparsity", type=float, metavar="X", help="share of attention to skip, 0 to 0.99"
    )
    group.add_argument(
        "--base-sparsity", type=float, metavar="X", help="limit it grows to (default: 0.10 above)"
    )
    add_schedule_kind(group)
    group.add_argument(
        "--policy",
        choices=("hierarchical", "block_top_k", "sliding_window", "dense"),
        help="which blocks are kept (default: hierarchical, the paper's)",
    )
    group.add_argument("--keep-frames", type=int, help="past frames to choose blocks from")
    group.add_argument("--keep-sink", type=int, help="of them the first ones")
    group.add_argument("--keep-near", type=int, help="of them the latest ones")
    group.add_argument(
        "--guarantee-sink", action="store_true", help="keep all blocks of the sink frames"
    )
    group.add_argument(
        "--guarantee-own-block", action="store_true", help="each query block keeps its own place"
    )
    group.add_argument("--query-block", type=int, help="tokens of a query block (default: 64)")
    group.add_argument("--key-block", type=int, help="tokens of a key block (default: 64)")
    group.add_argument(
        "--token-order",
        choices=("raster", "tiles"),
        help="tokens of a block: rows of the picture (default, as released) or compact tiles",
    )
    group.add_argument(
        "--plan",
        choices=("chunk", "pass"),
        help="choose blocks once a chunk (default), or anew in every pass as released",
    )
    group.add_argument(
        "--qk-precision",
        choices=("full", "int8"),
        help="products of queries and keys: full (default), or in eight bits",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "triton", "gluon", "reference"),
        help="who computes",
    )


def sparse_settings(arguments: argparse.Namespace) -> SparseSettings | None:
    """What the options of `add_sparse_options` ask for; None is dense."""
    from ..errors import UserError
    from ..sparse_settings import SparseSettings, make_policy, make_schedule

    if arguments.sparsity is None and not arguments.schedule_values:
        given = [name for name in _SPARSE_OPTIONS if getattr(arguments, name)]
        if given and not arguments.dense:
            option = given[0].replace("_", "-")
            raise UserError(f"--{option} has no meaning without --sparsity; give both or neither")
        return None
    if arguments.schedule_values and arguments.sparsity is not None:
        raise UserError(
            "--schedule-values says the sparsity of every chunk, and so does --sparsity; give one"
        )
    if arguments.dense:
        raise UserError("--dense and --sparsity contradict each other; give one of them")
    return SparseSettings(
        schedule=make_schedule(
            arguments.sparsity,
            base_sparsity=arguments.base_sparsity,
            kind=_schedule_kind(arguments),
            values=arguments.schedule_values,
        ),
        policy=make_policy(
            arguments.policy or "hierarchical",
            keep_frames=arguments.keep_frames,
            keep_sink=arguments.keep_sink,
            keep_near=arguments.keep_near,
            guarantee_sink=arguments.guarantee_sink,
            guarantee_own_block=arguments.guarantee_own_block,
        ),
        query_block_tokens=arguments.query_block,
        key_block_tokens=arguments.key_block,
        token_order=arguments.token_order or "raster",
        plan_steps=None if arguments.plan == "pass" else (0,),
        qk_precision=arguments.qk_precision or "full",
        backend=arguments.backend or "auto",
    )


def _schedule_kind(arguments: argparse.Namespace) -> str:
    return "hand_drawn" if arguments.schedule_values else arguments.schedule or "chunk_aware"


def _schedule(arguments: argparse.Namespace) -> int:
    from ..schedule import schedule_report
    from ..schedule_plot import plot_schedule
    from ..sparse_settings import make_schedule

    schedule = make_schedule(
        arguments.target,
        base_sparsity=arguments.base,
        kind=_schedule_kind(arguments),
        values=arguments.schedule_values,
    )
    report = schedule_report(
        schedule,
        frames=arguments.frames,
        frames_per_chunk=arguments.chunk,
        window_frames=arguments.window,
        frame_tokens=arguments.frame_tokens,
        block_tokens=arguments.block,
    )
    write_json(arguments.json, report)
    if arguments.plot is not None:
        plot_schedule(report, arguments.plot)
    say("chunk  frames  sees  sparsity  kept of key blocks")
    columns = ("chunk_frames", "visible_frames", "sparsities", "kept_blocks", "key_blocks")
    for i, (own, sees, sparsity, kept, of) in enumerate(
        zip(*(report[name] for name in columns), strict=True), start=1
    ):
        say(f"{i:>5}  {own:>6}  {sees:>4}  {sparsity:>8.4f}  {kept:>6} of {of}")
    after = report["density_after_anchors"]
    say(f"density {report['density']:.4f}, after the dense chunks {after:.4f}")
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    from ..errors import UserError
    from ..kernel_report import compile_report

    try:
        archs = [int(part) for part in arguments.arch.split(",")]
    except ValueError as error:
        raise UserError(
            f"--arch takes compute capabilities such as 86,89,120, got '{arguments.arch}'"
        ) from error
    report = compile_report(archs)
    write_json(arguments.json, report)
    for row in report["kernels"]:
        mark = "ok  " if row["ok"] else "FAIL"
        say(
            f"{mark} sm_{row['arch']:<4} {row['name']:<48} shared {row['shared_bytes']:>7}  "
            f"registers {row['registers']:>3}  spills {row['spill_bytes']}"
        )
    wrong = sum(not row["ok"] for row in report["kernels"])
    say(f"{len(report['kernels']) - wrong} of {len(report['kernels'])} kernels, triton "
        f"{report['triton']}")  # fmt: skip
    return EXIT_FAILED_CHECK if wrong else 0
