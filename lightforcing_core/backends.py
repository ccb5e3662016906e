"""Who computes sparse attention here: the torch reference or the Triton kernels.

`resolve_backend` decides once per run. What was asked for by name is never replaced by something
else: if it cannot do the job, the error lists every reason.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from .errors import UserError

log = logging.getLogger("lightforcing")

BACKENDS = ("auto", "triton", "gluon", "reference")
QK_PRECISIONS = ("full", "int8")
_TRITON_BLOCKS = (16, 32, 64, 128)
_INT8_BLOCKS = ((64, 64), (128, 64), (128, 128))
_GLUON_CAPABILITY = (9, 0)
_GLUON_QUERY_BLOCK, _GLUON_KEY_BLOCKS = 128, (64, 128)
_GPU_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class AttentionBackend:
    """The operations of sparse attention, with the signatures of `kernels.reference`.

    Attributes:
        query_block_tokens: the only query block it does; None: several.
        attend_variants: calls of `block_sparse_attention` that launch all its kernels between
            them; none: nothing is compiled.
    """

    name: str
    pool_blocks: Callable[..., Tensor]
    select_blocks: Callable[..., tuple[Tensor, Tensor]]
    block_sparse_attention: Callable[..., Tensor]
    project_blocks: Callable[..., tuple[Tensor, Tensor]]
    quantise_blocks: Callable[..., None]
    query_block_tokens: int | None = None
    attend_variants: tuple[Callable[..., Tensor], ...] = ()


@dataclass(frozen=True)
class AttentionJob:
    """What a run asks of its backend. Blocks in tokens.

    Attributes:
        query_block_is_free: nobody chose the query block; a backend may bring its own.
        qk_precision: one of `QK_PRECISIONS`.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_block_tokens: int
    key_block_tokens: int
    query_block_is_free: bool = False
    qk_precision: str = "full"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can work on this machine, and the reason in words."""

    name: str
    available: bool
    reason: str


REFERENCE = AttentionBackend(
    "reference",
    reference.pool_blocks,
    reference.select_blocks,
    reference.block_sparse_attention,
    reference.project_blocks,
    reference.quantise_blocks,
)


def list_backends() -> list[BackendStatus]:
    """Every backend and what this machine says to it, for `doctor`."""
    obstacles = triton_obstacles()
    where = "interpreted on the CPU (TRITON_INTERPRET=1), slow"
    if torch.cuda.is_available():
        where = f"on {torch.cuda.get_device_name()}"
    return [
        BackendStatus(
            "sparse attention: triton", not obstacles, "; ".join(obstacles) or f"kernels {where}"
        ),
        BackendStatus(
            "sparse attention: gluon",
            not (hopper := obstacles or _gluon_machine_obstacles()),
            "; ".join(hopper) or "Hopper's own attention kernel, query blocks of 128",
        ),
        BackendStatus(
            "sparse attention: reference", True, "plain torch, any device, exact and slow"
        ),
    ]


def resolve_backend(name: str, job: AttentionJob) -> AttentionBackend:
    """The backend for a run.

    Args:
        name: 'reference', 'triton', 'gluon' (Hopper's own attention kernel, the rest as
            'triton'), or 'auto': the fastest that can do the job, logged.
        job: what it has to do.

    Raises:
        UserError: no such backend, or the one named cannot do the job; lists every reason.
    """
    if name == "reference":
        return REFERENCE
    if name not in BACKENDS:
        raise UserError(f"no attention backend '{name}'; choose one of {', '.join(BACKENDS)}")
    obstacles = _triton_obstacles(job)
    if name == "gluon":
        obstacles += _gluon_obstacles(job)
    if name != "auto":
        if obstacles:
            raise UserError(
                f"the attention backend '{name}' cannot be used: {'; '.join(obstacles)}; "
                "choose 'auto' or 'reference'"
            )
        return _gluon() if name == "gluon" else _triton()
    # Triton's interpreter makes a CPU look able, but only a test would ask for it, and by name.
    if obstacles or job.device.type != "cuda":
        log.info("sparse attention: reference (triton: %s)", "; ".join(obstacles) or "interpreted")
        if job.device.type == "cuda":
            log.warning(
                "sparse attention runs in plain torch and is slower than dense attention: %s",
                "; ".join(obstacles),
            )
        return REFERENCE
    if not (hopper := _gluon_obstacles(job)):
        log.info("sparse attention: gluon, query blocks of %d tokens", _GLUON_QUERY_BLOCK)
        return _gluon()
    log.info("sparse attention: triton (gluon: %s)", "; ".join(hopper))
    return _triton()


def _triton() -> AttentionBackend:
    # Late: importing Triton takes a second, and a machine without it must import the core.
    from ..kernels import ops

    return AttentionBackend(
        "triton",
        ops.pool_blocks_triton,
        ops.select_blocks_triton,
        ops.block_sparse_attention_triton,
        ops.project_blocks_triton,
        ops.quantise_blocks_triton,
        attend_variants=(ops.block_sparse_attention_triton,),
    )


def _gluon() -> AttentionBackend:
    from ..kernels.gluon_attention import block_sparse_attention_gluon
    from ..kernels.rounds import Rounds

    return replace(
        _triton(),
        name="gluon",
        block_sparse_attention=block_sparse_attention_gluon,
        query_block_tokens=_GLUON_QUERY_BLOCK,
        # With every list cut in two, it is followed by the kernel that joins them.
        attend_variants=(partial(block_sparse_attention_gluon, rounds=Rounds(0, 2)),),
    )


def _gluon_machine_obstacles() -> list[str]:
    """Reasons why this machine cannot run the Gluon kernel, beside those of Triton."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == _GLUON_CAPABILITY:
        return []
    return ["it needs compute capability 9.0 (H100, H200)"]


def _gluon_obstacles(job: AttentionJob) -> list[str]:
    """What the Gluon kernel cannot do of a job that the others could."""
    obstacles = _gluon_machine_obstacles()
    if job.query_block_tokens != _GLUON_QUERY_BLOCK and not job.query_block_is_free:
        obstacles.append(
            f"its query blocks are {_GLUON_QUERY_BLOCK} tokens, asked were {job.query_block_tokens}"
        )
    if job.qk_precision != "full":
        obstacles.append(f"it has no {job.qk_precision} products")
    if job.dtype not in _GPU_DTYPES:
        obstacles.append(f"it cannot compute in {_plain(job.dtype)}")
    if job.key_block_tokens not in _GLUON_KEY_BLOCKS:
        obstacles.append(
            f"its key blocks are {_listed(_GLUON_KEY_BLOCKS)} tokens, asked were "
            f"{job.key_block_tokens}"
        )
    return obstacles


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacles() -> list[str]:
    """Reasons why this machine cannot run the Triton kernels at all."""
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (it comes with torch's CUDA builds for Linux)"]
    if torch.cuda.is_available() or _is_interpreted():
        return _import_obstacles()
    return ["torch sees no CUDA device"]


def _import_obstacles() -> list[str]:
    try:
        _triton()
    # A Triton of another age may fail in any way while its kernels are defined.
    except Exception as error:  # noqa: BLE001
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return [f"its kernels do not load with the installed Triton ({reason})"]
    return []


def _triton_obstacles(job: AttentionJob) -> list[str]:
    """Every reason why the Triton kernels cannot do a job."""
    obstacles = triton_obstacles()

    def demand(met: bool, reason: str) -> None:
        if not met:
            obstacles.append(reason)

    if job.device.type == "cuda":
        if torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(job.device)
            demand(
                capability >= _LEAST_CAPABILITY,
                f"it needs compute capability 8.0 or higher, {job.device} has "
                f"{capability[0]}.{capability[1]}",
            )
    else:
        demand(_is_interpreted(), f"it needs a CUDA device, this run is on {job.device}")
    for kind, tokens in (("query", job.query_block_tokens), ("key", job.key_block_tokens)):
        demand(
            tokens in _TRITON_BLOCKS,
            f"its {kind} blocks are {_listed(_TRITON_BLOCKS)} tokens, asked were {tokens}",
        )
    blocks = job.query_block_tokens, job.key_block_tokens
    demand(
        job.qk_precision == "full" or blocks in _INT8_BLOCKS,
        f"its {job.qk_precision} products need query and key blocks of "
        f"{' or '.join(f'{q} and {k}' for q, k in _INT8_BLOCKS)} tokens, asked were "
        f"{blocks[0]} and {blocks[1]}",
    )
    # Float32 has no tensor cores to speak of; only the interpreter, in tests, computes in it.
    can_compute = job.dtype in _GPU_DTYPES or (job.dtype == torch.float32 and _is_interpreted())
    demand(can_compute, f"it cannot compute in {_plain(job.dtype)}")
    head_dims = _triton_head_dims()
    demand(
        not head_dims or job.head_dim in head_dims,
        f"its head dims are {_listed(head_dims)}, this model has {job.head_dim}",
    )
    return obstacles


def _triton_head_dims() -> tuple[int, ...]:
    """Head dims of the kernels; none where they cannot be imported, which is said elsewhere."""
    if triton_obstacles():
        return ()
    from ..kernels.triton_attention import HEAD_DIMS

    return HEAD_DIMS


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
