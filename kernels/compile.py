"""Compiles every shipped kernel for GPUs that need not be there, and reads the assembler's report.

Each kernel is compiled from the same `Launch` that would run it, with tensors on the meta device,
so types, constants and divisibility hints are those of real launches.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia import hopper as gluon_hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import (
    ARCHS,
    BLOCK_SIZES,
    HEAD_DIMS,
    INT8_BLOCK_SIZES,
    SHARED_BYTES,
    AttentionConfig,
    attention_config,
)
from .eight_bit import Scaling
from .gluon_attention import CONFIGS, plan_gluon
from .grid import BlockGrid
from .launch import Launch, is_interpreted
from .reference_channels import (
    PackedWeights,
    pack_enlarging,
    pack_in_cells,
    pack_in_pairs,
    pack_plain,
)
from .triton_attention import plan_attention
from .triton_channels import plan_convolution
from .triton_merge import plan_merge
from .triton_normalisation import plan_normalisation
from .triton_pooling import plan_pooling
from .triton_projection import plan_projection, plan_row_scales
from .triton_quantisation import plan_quantisation
from .triton_repeated import plan_repeated
from .triton_rows import plan_add_norm, plan_rms_norm, plan_round_rows
from .triton_selection import plan_scores, plan_selection
from .triton_sums import plan_scale_sums

TUNED_WITH = "3.6."
"""Triton whose compiler the configurations answer to; another allocates registers differently."""
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
}
_HEADS, _SEGMENTS, _TOP_K = 12, 21, 51


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel in one configuration needs on one architecture.

    Attributes:
        name: the kernel and its configuration.
        arch: compute capability, 90 for 9.0.
        shared_bytes, registers: of one program, of one thread.
        spill_bytes: stores and loads of spilled registers, as ptxas reports them.
        narrow: loads and stores of a single number of one or two bytes. Where addresses are not
            known to be aligned, there is one for each number and they take several times as long.
        ok: it compiled and fits the architecture's shared memory; and, with the Triton that the
            configurations were chosen with, nothing spills.
        error: why it did not compile, else empty.
    """

    name: str
    arch: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    narrow: int
    ok: bool
    error: str = ""


def compile_all(archs: Sequence[int] = ARCHS, *, processes: int = 2) -> list[CompiledKernel]:
    """Compile all that is shipped for these architectures.

    Args:
        archs: compute capabilities out of `configs.ARCHS`.
        processes: to share the work; 1 stays in this process.

    Raises:
        ValueError: an architecture for which nothing is shipped.
        RuntimeError: Triton's interpreter is on (TRITON_INTERPRET=1).
    """
    if unknown := set(archs) - set(ARCHS):
        raise ValueError(f"kernels are shipped for {ARCHS}, not for {sorted(unknown)}")
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter replaces the compiler")
    work = [(arch, name) for arch in archs for name in launches(arch)]
    if processes == 1:
        return [_compile_one(item) for item in work]
    # Spawned, not forked: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_compile_one, work, chunksize=8)


def launches(arch: int) -> dict[str, Callable[[], Launch]]:
    """Every kernel and configuration shipped for an architecture, by name."""
    found: dict[str, Callable[[], Launch]] = {}
    for name, plan in (
        *_attention_launches(arch),
        *_row_launches(arch),
        *_channel_launches(arch),
        *_small_launches(arch),
    ):
        found.setdefault(name, plan)
    return found


def compile_launch(launch: Launch, arch: int) -> tuple[Any, str]:
    """Triton's compiled kernel for an architecture, and the log of ptxas."""
    log = io.StringIO()
    with contextlib.ExitStack() as stack:
        # A kernel from the cache would come without the log.
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(triton.knobs.nvidia.scope())
        triton.knobs.nvidia.dump_ptxas_log = True
        stack.enter_context(contextlib.redirect_stdout(log))
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(_source(launch), target=target, options=launch.compile_options)
    return compiled, log.getvalue()


def _compile_one(item: tuple[int, str]) -> CompiledKernel:
    arch, name = item
    try:
        compiled, log = compile_launch(launches(arch)[name](), arch)
    except Exception as error:  # noqa: BLE001  a compiler may fail in any way; the row says how
        return CompiledKernel(name, arch, 0, 0, 0, 0, False, f"{type(error).__name__}: {error}")
    shared = compiled.metadata.shared
    registers = _most(r"Used (\d+) registers", log)
    spill = _most(r"(\d+) bytes spill stores", log) + _most(r"(\d+) bytes spill loads", log)
    narrow = len(re.findall(r"(?:ld|st)\.global\.(?:\w+::\w+\.)*b(?:8|16)\b", compiled.asm["ptx"]))
    may_spill = not triton.__version__.startswith(TUNED_WITH)
    ok = shared <= SHARED_BYTES[arch] and (may_spill or not spill)
    return CompiledKernel(name, arch, shared, registers, spill, narrow, ok)


def _most(pattern: str, log: str) -> int:
    return max(map(int, re.findall(pattern, log)))


def _source(launch: Launch) -> ASTSource:
    """What Triton's launcher would compile for this launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        is_aligned = False
        if parameter.is_constexpr or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor | gluon_hopper.TensorDescriptor):
            shape = ", ".join(map(str, value.block_shape))
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]{layout}>"
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            is_aligned = not parameter.do_not_specialize_on_alignment
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = not parameter.do_not_specialize and value % 16 == 0
        if is_aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return source(launch.kernel, signature, constants, hints)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_launches(arch: int) -> Iterator[tuple[str, Callable[[], Launch]]]:
    def plan(
        head_dim: int, q_block: int, kv_block: int, segment: int, config: Any, make: Callable
    ) -> Launch:
        q_grid, kv_grid = BlockGrid(segment, q_block), BlockGrid(segment, kv_block)
        q = _meta(1, 3 * segment, _HEADS, head_dim)
        k = _meta(1, _SEGMENTS * kv_grid.slot_tokens, _HEADS, head_dim)
        rows = 1, _HEADS, 3 * q_grid.blocks_per_segment
        ids, counts = _meta(*rows, _TOP_K, dtype=torch.int32), _meta(*rows, dtype=torch.int32)
        return make(q, k, k, ids, counts, q_grid, kv_grid, 0.1, q, config)

    if arch == 90:
        gluon = itertools.product(HEAD_DIMS, CONFIGS, ((1564, "ragged"), (1536, "whole")))
        for head_dim, kv_block, (segment, blocks) in gluon:
            config = CONFIGS[kv_block]
            name = (
                f"attention d{head_dim} q128 k{kv_block} {blocks}: "
                f"128x{config.tile} s{config.stages} gluon"
            )
            parts = _meta(36, 3, 128, head_dim, dtype=torch.float32)
            make = partial(plan_gluon, parts=parts, log_sums=parts[..., 0])
            arguments = head_dim, 128, kv_block, segment, config, make
            yield name, lambda arguments=arguments: plan(*arguments)
    for head_dim, (q_block, kv_block) in itertools.product(HEAD_DIMS, BLOCK_SIZES):
        for allow_tma in (True, False):
            config = attention_config(arch, head_dim, q_block, kv_block, allow_tma=allow_tma)
            # Small blocks have one variant, which masks short blocks.
            variants = [(1564, "ragged")]
            if min(q_block, kv_block) >= 64:
                variants.append((1536, "whole"))
            for segment, blocks in variants:
                name = (
                    f"attention d{head_dim} q{q_block} k{kv_block} {blocks}: "
                    f"{config.tile_m}x{config.tile_n} w{config.num_warps} "
                    f"s{config.num_stages} {'tma' if config.use_tma else 'pointers'}"
                )
                arguments = head_dim, q_block, kv_block, segment, config, plan_attention
                yield name, lambda arguments=arguments: plan(*arguments)
    yield from _int8_launches(arch)


def _product(columns: int, of: torch.dtype | None) -> tuple[Tensor, Scaling | None]:
    """Rows as they are, or as a product of eight-bit numbers of a type leaves them."""
    if of is None:
        return _meta(4680, columns), None
    rows, across = (_meta(*shape, dtype=torch.float32) for shape in ((4680, 1), (1, columns)))
    x = _meta(4680, columns, dtype=torch.int32 if of == torch.int8 else torch.bfloat16)
    return x, Scaling(rows, across, _meta(columns))


def _eight_bit_types(arch: int) -> dict[str, torch.dtype]:
    """What the hardware multiplies."""
    types = {"int8": torch.int8}
    return types if arch < 89 else {**types, "e4m3": torch.float8_e4m3fn}


def _int8_launches(arch: int) -> Iterator[tuple[str, Callable[[], Launch]]]:
    def attention(head_dim: int, q_block: int, kv_block: int, config: AttentionConfig) -> Launch:
        q_grid, kv_grid = BlockGrid(1564, q_block), BlockGrid(1564, kv_block)
        q = _meta(1, 3 * 1564, _HEADS, head_dim)
        shape = 1, _SEGMENTS * kv_grid.slot_tokens, _HEADS, head_dim
        k, v = _meta(*shape, dtype=torch.int8), _meta(*shape)
        rows = 1, _HEADS, 3 * q_grid.blocks_per_segment
        ids, counts = _meta(*rows, _TOP_K, dtype=torch.int32), _meta(*rows, dtype=torch.int32)
        blocks = _SEGMENTS * kv_grid.blocks_per_segment
        scales = _meta(1, _HEADS, blocks, dtype=torch.float32)
        return plan_attention(q, k, v, ids, counts, q_grid, kv_grid, 0.1, q, config, scales)

    def quantisation(head_dim: int, block: int) -> Launch:
        grid = BlockGrid(1564, block)
        x = _meta(1, 3 * grid.slot_tokens, _HEADS, head_dim)
        scales = _meta(1, _HEADS, 3 * grid.blocks_per_segment, dtype=torch.float32)
        shift = _meta(1, _HEADS, head_dim, dtype=torch.float32)
        return plan_quantisation(x, shift, grid, _meta(*x.shape, dtype=torch.int8), scales)

    for head_dim, (q_block, kv_block) in itertools.product(HEAD_DIMS, INT8_BLOCK_SIZES):
        for allow_tma in (True, False):
            config = attention_config(
                arch, head_dim, q_block, kv_block, allow_tma=allow_tma, int8_keys=True
            )
            name = (
                f"attention d{head_dim} q{q_block} k{kv_block} int8: "
                f"{config.tile_m}x{config.tile_n} w{config.num_warps} "
                f"s{config.num_stages} {'tma' if config.use_tma else 'pointers'}"
            )
            arguments = head_dim, q_block, kv_block, config
            yield name, lambda arguments=arguments: attention(*arguments)
    for head_dim, block in itertools.product(HEAD_DIMS, {kv for _, kv in INT8_BLOCK_SIZES}):
        yield f"quantisation d{head_dim} b{block}", lambda d=head_dim, b=block: quantisation(d, b)


def _row_launches(arch: int) -> Iterator[tuple[str, Callable[[], Launch]]]:
    """Widths of 1.3B and 14B; rounding to what the hardware multiplies."""
    wide, eight_bit_types = torch.float32, _eight_bit_types(arch)

    def rounding(columns: int, gelu: bool, to: torch.dtype) -> Launch:
        out, scales = _meta(4680, columns, dtype=to), _meta(4680, 1, dtype=wide)
        x, scaling = _product(columns, to if gelu and to == torch.int8 else None)
        return plan_round_rows(x, out, scales, gelu, scaling)

    def scaling(columns: int) -> Launch:
        sums, out = _meta(4680, columns, dtype=torch.int32), _meta(4680, columns)
        rows, across = _meta(4680, 1, dtype=wide), _meta(1, columns, dtype=wide)
        return plan_scale_sums(sums, rows, across, out[0], out)

    def norm(columns: int, kind: str, eight_bit: torch.dtype | None) -> Launch:
        x, scales = _meta(4680, columns), _meta(4680, 1, dtype=wide)
        table, weight = _meta(3, columns, dtype=wide), _meta(1, columns)
        out = x if eight_bit is None else _meta(4680, columns, dtype=eight_bit)
        branch, scaling = _product(columns, eight_bit)
        by_row, across, bias = (None, None, None) if scaling is None else scaling
        # A sum with a gate, one without, none.
        gate, offset, gain, shift = {
            "gated": (table, None if scaling is None else table, table, table),
            "affine": (table, None if scaling is None else table, weight, weight),
            "added": (across, None if bias is None else bias[None], table, table),
            "first": (None, None, table, table),
        }[kind]
        if kind == "first":
            branch = by_row = None
        return plan_add_norm(x, branch, by_row, gate, offset, gain, shift, out, scales, 1e-6)

    def rms_norm(columns: int, of: torch.dtype | None) -> Launch:
        x, scaling = _product(columns, of)
        return plan_rms_norm(x, _meta(columns), _meta(4680, columns), 1e-6, scaling)

    def row_scales(columns: int, of: torch.dtype | None) -> Launch:
        x, scaling = _product(3 * columns, of)
        x_q, x_k, _ = x[None].chunk(3, 2)
        return plan_row_scales(x_q, x_k, _meta(2, 4680, dtype=wide), 1e-6, scaling)

    for columns in (1536, 5120):
        for name, of in {"": None, **eight_bit_types}.items():
            yield f"row scales {columns} {name}", lambda a=(columns, of): row_scales(*a)
            yield f"norm {columns} rms {name}", lambda a=(columns, of): rms_norm(*a)
        for kind in ("gated", "affine", "added", "first"):
            yield f"norm {columns} {kind}", lambda a=(columns, kind, None): norm(*a)
            for name, to in eight_bit_types.items():
                arguments = columns, kind, to
                yield f"norm {columns} {kind} to {name}", lambda a=arguments: norm(*a)
    rounded = [(columns, False) for columns in (1536, 5120, 8960, 13824)]  # weights too
    rounded += [(8960, True), (13824, True)]
    for (columns, gelu), (to_name, to) in itertools.product(rounded, eight_bit_types.items()):
        name = f"rounding {columns}{' gelu' if gelu else ''} to {to_name}"
        yield name, lambda n=columns, g=gelu, t=to: rounding(n, g, t)
    for columns in (1536, 4608, 8960, 5120, 15360, 13824):
        yield f"scaling {columns}", lambda n=columns: scaling(n)


def _channel_launches(arch: int) -> Iterator[tuple[str, Callable[[], Launch]]]:
    """Every kind of convolution of the video decoders, at their widths."""

    def convolution(
        pack: Callable[[Tensor], PackedWeights],
        sizes: tuple[int, ...],
        has_residual: bool,
        batch: int = 1,
        slices: int = 12,
        is_normalised: bool = False,
    ) -> Launch:
        weights = pack(_meta(*sizes, 3, 3))
        x = _meta(batch, slices + weights.depth_taps - 1, 480, 832, weights.channels)
        out, bias = _meta(*weights.out_shape(x)), _meta(weights.out_channels)
        residual = out if has_residual else None
        gain = bias if is_normalised else None
        return plan_convolution(
            x, weights, bias, residual, out, gain=gain, is_rectified=gain is None, capability=arch
        )

    def planes(channels: int, taps: int) -> Launch:
        weights = pack_in_cells(_meta(3, channels, taps, 3, 3))
        x = _meta(1, 14, 480, 832, channels)
        batch, depth, height, width, _ = weights.out_shape(x)
        out = _meta(batch, depth, 3, height, width, dtype=torch.float32)
        return plan_convolution(x, weights, _meta(3), None, out, to_planes=True, capability=arch)

    def normalisation(channels: int, has_more: bool) -> Launch:
        x, vector = _meta(1, 14, 480, 832, channels), _meta(channels)
        more = (vector, x, x) if has_more else (None, None, None)
        out, kept = _meta(1, 16, *x.shape[2:]), x[:, :2]
        return plan_normalisation(x, vector, *more, out, kept, kept, is_activated=True)

    plain = (
        (256, 16, 1),
        (256, 256, 2),
        (256, 256, 1),
        (128, 128, 2),
        (64, 64, 2),
        (64, 64, 1),
        (48, 48, 3),
    )
    pairs = ((24, 24, 3),)
    enlarging = ((1, 192, 384), (1, 96, 192), (1, 48, 96), (1, 24, 48))
    grown = ((1, 128, 256), (2, 64, 128), (2, 64, 64))
    kinds = (("plain", pack_plain, plain), ("pairs", pack_in_pairs, pairs),
             ("enlarging", pack_enlarging, enlarging + grown))  # fmt: skip
    for kind, pack, all_sizes in kinds:
        for sizes, has_residual in itertools.product(all_sizes, (False, True)):
            if has_residual and kind == "enlarging":
                continue
            name = f"convolution {kind} {'x'.join(map(str, sizes))}{' sum' if has_residual else ''}"
            arguments = pack, sizes, has_residual
            yield name, lambda arguments=arguments: convolution(*arguments)
    # Normalised; also fewer slices of one program, for short videos and first chunks.
    for (kind, pack, sizes), slices in itertools.product(
        (("pairs", pack_in_pairs, (24, 24, 3)), ("plain", pack_plain, (48, 48, 3))),
        (1, 2, 3, 12),
    ):
        arguments = pack, sizes, False, 1, slices, True
        yield (
            f"convolution {kind} {sizes[0]} norm slices {slices}",
            partial(convolution, *arguments),
        )
    if arch == 90:
        widths = ((96, 16, 3), (96, 48, 3), (96, 96, 3))
        for sizes, is_normalised, slices in itertools.product(widths, (False, True), (1, 6)):
            name = f"convolution plain {'x'.join(map(str, sizes))}"
            arguments = pack_plain, sizes, False, 1, slices, is_normalised
            name += f"{' norm' if is_normalised else ''} slices {slices} gluon"
            yield name, partial(convolution, *arguments)
    # Batches beyond 32-bit offsets.
    for sizes in ((256, 256, 1), (64, 64, 1)):
        name = f"convolution plain {'x'.join(map(str, sizes))} sum large"
        yield name, lambda sizes=sizes: convolution(pack_plain, sizes, True, 16)
    for sizes in ((24, 3), (64, 1), (96, 3)):
        yield f"convolution planes {sizes[0]}x{sizes[1]}", lambda sizes=sizes: planes(*sizes)
    for channels, has_more in itertools.product((24, 96, 192, 384), (False, True)):
        name = f"normalisation {channels}{' sum' if has_more else ''}"
        arguments = channels, has_more
        yield name, lambda arguments=arguments: normalisation(*arguments)


def _small_launches(arch: int) -> Iterator[tuple[str, Callable[[], Launch]]]:
    def pooling(head_dim: int, block: int) -> Launch:
        grid = BlockGrid(1560, block)
        x = _meta(1, 3 * grid.slot_tokens, _HEADS, head_dim)
        out = _meta(1, _HEADS, 3 * grid.blocks_per_segment, head_dim, dtype=torch.float32)
        return plan_pooling(x, out, grid, True)

    def scores(head_dim: int) -> Launch:
        q, k = (_meta(1, _HEADS, n, head_dim, dtype=torch.float32) for n in (75, 525))
        return plan_scores(q, k, _meta(1, _HEADS, 75, 525, dtype=torch.float32))

    def selection(segments: int, blocks: int, has_own: bool, has_limits: bool = False) -> Launch:
        num_k = segments * blocks
        roles, ids = _meta(segments, dtype=torch.int32), _meta(75, dtype=torch.int32)
        lists = _meta(1, _HEADS, 75, _TOP_K, dtype=torch.int32)
        all_scores = _meta(1, _HEADS, 75, num_k, dtype=torch.float32)
        own = ids if has_own else None
        limits = roles[:2] if has_limits else None
        return plan_selection(all_scores, roles, lists, lists[..., 0], blocks, 3, own, limits)

    def merge(head_dim: int) -> Launch:
        parts = _meta(36, 3, 128, head_dim, dtype=torch.float32)
        out = _meta(1, 4680, _HEADS, head_dim)
        return plan_merge(parts, parts[..., 0], out, 396, BlockGrid(4680, 128))

    def repeated(head_dim: int) -> Launch:
        q, k = _meta(1, 4680, _HEADS, head_dim), _meta(1, 512, _HEADS, head_dim)
        return plan_repeated(q, k, k, _meta(1, dtype=torch.int32), q)

    def projection(
        head_dim: int,
        q_block: int,
        kv_block: int,
        heads: int,
        pools: bool,
        of: torch.dtype | None = None,
    ) -> Launch:
        kv_grid = BlockGrid(1560, kv_block if pools else 1560)
        joined, scaling = _product(3 * heads * head_dim, of)
        x, slots = joined[None].chunk(3, 2), _meta(3, dtype=torch.int32)
        keys = _meta(1, _SEGMENTS, kv_grid.slot_tokens, heads, head_dim)
        blocks = _SEGMENTS * kv_grid.blocks_per_segment
        angles, out = (
            _meta(4680, head_dim // 2, dtype=torch.float32),
            _meta(1, 4680, heads, head_dim),
        )
        q_grid = BlockGrid(4680, q_block)
        pooled, pooled_q = (
            _meta(1, heads, n, head_dim, dtype=torch.float32) if pools else None
            for n in (blocks, q_grid.blocks_per_segment)
        )
        scales = _meta(2, 4680, dtype=torch.float32)
        weight = _meta(heads * head_dim)
        return plan_projection(*x, weight, weight, scales, angles, angles, keys, keys, pooled,
                               slots, out, pooled_q, q_grid, kv_grid, scaling)  # fmt: skip

    for head_dim, blocks in itertools.product(HEAD_DIMS, ((16, 16), (64, 64), (128, 64))):
        shape = head_dim, *blocks, _HEADS, True
        name = f"projection d{head_dim} q{blocks[0]} k{blocks[1]}"
        yield name, lambda shape=shape: projection(*shape)
        wanted = _eight_bit_types(arch) if head_dim == 128 and blocks[1] == 64 else {}
        for name_of, of in wanted.items():
            yield f"{name} {name_of}", lambda shape=(*shape, of): projection(*shape)
    yield "projection d128 14B", lambda: projection(128, 128, 64, 40, True)
    yield "projection d128 dense", lambda: projection(128, 64, 64, _HEADS, False)
    for head_dim in HEAD_DIMS:
        yield f"repeated d{head_dim}", lambda d=head_dim: repeated(d)
        yield f"merge d{head_dim}", lambda d=head_dim: merge(d)
    for head_dim, block in itertools.product(HEAD_DIMS, (16, 32, 64, 128)):
        yield f"pooling d{head_dim} b{block}", lambda d=head_dim, b=block: pooling(d, b)
    yield "scores", lambda: scores(128)
    # Two block sizes of a common cache, a longer cache, and the largest tiles.
    yield "selection 21x25", lambda: selection(21, 25, False)
    yield "selection 21x25 limits", lambda: selection(21, 25, False, True)
    for shape in ((21, 13), (21, 25), (120, 25), (328, 25), (8192, 1)):
        name = f"selection {shape[0]}x{shape[1]} own"
        yield name, lambda shape=shape: selection(*shape, True)
