"""Sparse Attention: MODEL to MODEL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..lightforcing_core.backends import BACKENDS
from ..lightforcing_core.errors import UserError
from ..lightforcing_core.layout import TOKEN_ORDERS
from ..lightforcing_core.selection import SelectionPolicy
from ..lightforcing_core.sparse_settings import (
    POLICIES,
    PassBudgets,
    SparseSettings,
    make_policy,
    make_schedule,
)
from .adapter.options import SparseChoice
from .adapter.patching import patch_model
from .schema import check_choices, node_schema

PRESETS = ("custom", "5 seconds", "long video", "Hopper GPU")
_PLAN_STEPS: dict[str, tuple[int, ...] | None] = {
    "once a chunk": (0,),
    "first two steps": (0, 1),
    "every pass": None,
}
# Target and base sparsity, top-k frames with sink and near ones: the released settings.
PRESET_VALUES: dict[str, dict[str, float | int]] = {
    "5 seconds": {
        "target_sparsity": 0.88,
        "base_sparsity": 0.98,
        "keep_frames": 6,
        "sink_frames": 1,
        "near_frames": 2,
    },
    "long video": {
        "target_sparsity": 0.85,
        "base_sparsity": 0.95,
        "keep_frames": 3,
        "sink_frames": 1,
        "near_frames": 1,
    },
    "Hopper GPU": {
        "target_sparsity": 0.80,
        "base_sparsity": 0.90,
        "keep_frames": 6,
        "sink_frames": 1,
        "near_frames": 2,
    },
}


def sparse_settings(
    *,
    preset: str,
    target_sparsity: float,
    base_sparsity: float,
    schedule: str,
    policy: str,
    keep_frames: int,
    sink_frames: int,
    near_frames: int,
    dense_chunks: int,
    block_size: str,
    keep_blocks: int,
    plan: str,
    dense_first_layers: int,
    dense_last_layers: int,
    backend: str,
    token_order: str = "raster",
) -> SparseSettings:
    """The settings that the node's inputs come to; a preset other than 'custom' overrules five.

    Raises:
        UserError: values that do not fit together.
    """
    values = PRESET_VALUES.get(preset, {})
    target = float(values.get("target_sparsity", target_sparsity))
    base = float(values.get("base_sparsity", base_sparsity))
    block = None if block_size == "auto" else int(block_size)
    return SparseSettings(
        schedule=make_schedule(target, base_sparsity=base, kind=schedule),
        policy=_policy(
            policy,
            int(values.get("keep_frames", keep_frames)),
            int(values.get("sink_frames", sink_frames)),
            int(values.get("near_frames", near_frames)),
        ),
        query_block_tokens=block,
        key_block_tokens=block,
        plan_steps=_PLAN_STEPS[plan],
        budgets=PassBudgets(first_layers=dense_first_layers, last_layers=dense_last_layers),
        dense_chunks=dense_chunks,
        keep_blocks=keep_blocks or None,
        backend=backend,
        token_order=token_order,
    )


def _policy(kind: str, keep_frames: int, sink_frames: int, near_frames: int) -> SelectionPolicy:
    if kind == "hierarchical":
        return make_policy(
            kind, keep_frames=keep_frames, keep_sink=sink_frames, keep_near=near_frames
        )
    if kind == "sliding_window":
        return make_policy(kind, keep_sink=sink_frames, keep_near=near_frames)
    return make_policy(kind)


def read_settings(values: Mapping[str, Any]) -> tuple[SparseSettings, bool]:
    """Settings and switch of this node's inputs by name, as a page sends them.

    Inputs that are left out have their defaults; those of other kinds (the MODEL) are passed over.

    Raises:
        UserError: a value out of range or of the wrong type.
    """
    read: dict[str, Any] = {}
    for widget in SparseAttention.define_schema().inputs:
        if isinstance(widget, io.Model.Input):
            continue
        read[widget.id] = _checked(widget, values.get(widget.id, widget.default))
    enabled = read.pop("enabled")
    return sparse_settings(**read), enabled


def _checked(widget: Any, value: Any) -> Any:
    """A value that a widget can have."""
    expected = "something else"
    if isinstance(widget, io.Combo.Input):
        if value in widget.options:
            return value
        expected = f"one of {', '.join(map(str, widget.options))}"
    elif isinstance(widget, io.Boolean.Input):
        if isinstance(value, bool):
            return value
        expected = "true or false"
    else:
        whole = isinstance(widget, io.Int.Input)
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if right and widget.min <= value <= widget.max:
            return value
        number = "a whole number" if whole else "a number"
        expected = f"{number} from {widget.min:g} to {widget.max:g}"
    raise UserError(f"{widget.id} must be {expected}, got {json.dumps(value, default=str)[:80]}")


class SparseAttention(io.ComfyNode):
    """Light Forcing's sparse self-attention for an autoregressive Wan MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingSparseAttention",
            display_name="Sparse Attention (Light Forcing)",
            description=(
                "Makes the self-attention of an autoregressive Wan MODEL sparse: every chunk looks "
                "at a share of the past only, more of it in the first chunks and less later on "
                "(Chunk-Aware Growth), and takes whole frames, then blocks of them, by what they "
                "are worth (hierarchical selection). For Chunk Sampler, Stream Video and ComfyUI's "
                "SamplerARVideo."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load Model or Load Diffusion Model."),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    tooltip="Off: dense attention, for comparing. Nothing else changes.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="custom",
                    tooltip="The released settings. 5 seconds: 0.88, 0.98, 6 / 1 / 2 frames; long "
                    "video: 0.85, 0.95, 3 / 1 / 1; Hopper GPU: 0.80, 0.90, 6 / 1 / 2. They "
                    "overrule the two sparsities and three frame counts below; custom takes those.",
                ),
                io.Float.Input(
                    "target_sparsity",
                    default=0.88,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Share of attention to skip over the whole video, 0 (dense) to 0.99. "
                    "Higher is faster and loses detail.",
                ),
                io.Float.Input(
                    "base_sparsity",
                    default=0.98,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Sparsity that late chunks grow towards, from the target to 0.99. The "
                    "further above the target, the more the first chunks may see.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=["chunk_aware", "uniform", "linear"],
                    default="chunk_aware",
                    tooltip="How sparsity goes from chunk to chunk. chunk_aware: the paper's "
                    "growth; uniform: the target everywhere; linear: from the target to the base.",
                ),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default="hierarchical",
                    tooltip="Which blocks are kept. hierarchical: the paper's frames, then blocks; "
                    "block_top_k: the best blocks of all frames; sliding_window: sink and near "
                    "frames whole; dense: all.",
                ),
                io.Int.Input(
                    "keep_frames",
                    default=6,
                    min=0,
                    max=256,
                    tooltip="Past latent frames that a query block may look into, sink and near "
                    "frames counted, 0 to 256 (hierarchical).",
                ),
                io.Int.Input(
                    "sink_frames",
                    default=1,
                    min=0,
                    max=64,
                    tooltip="First latent frames of the video that always are among them, 0 to 64 "
                    "(hierarchical, sliding_window).",
                ),
                io.Int.Input(
                    "near_frames",
                    default=2,
                    min=0,
                    max=64,
                    tooltip="Last latent frames before the chunk that always are among them, 0 to "
                    "64 (hierarchical, sliding_window).",
                ),
                io.Int.Input(
                    "dense_chunks",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="First chunks to leave dense, 0 to 64. The very first always is.",
                ),
                io.Combo.Input(
                    "block_size",
                    options=["auto", "16", "32", "64", "128"],
                    default="auto",
                    tooltip="Tokens of a block, the unit that is kept or skipped. auto: 64 as "
                    "released, less for small pictures. Cannot change in mid-run.",
                ),
                io.Int.Input(
                    "keep_blocks",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Key blocks that each query block keeps in every sparse chunk, instead "
                    "of what its sparsity comes to; 0: by sparsity.",
                ),
                io.Combo.Input(
                    "plan",
                    options=list(_PLAN_STEPS),
                    default="once a chunk",
                    tooltip="At which denoising steps blocks are chosen anew; other passes use the "
                    "latest choice. every pass is the released way and slower.",
                ),
                io.Int.Input(
                    "dense_first_layers",
                    default=0,
                    min=0,
                    max=40,
                    tooltip="First transformer layers to leave dense, 0 to 40.",
                ),
                io.Int.Input(
                    "dense_last_layers",
                    default=0,
                    min=0,
                    max=40,
                    tooltip="Last transformer layers to leave dense, 0 to 40.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip="What computes it. auto: the fastest that runs here; reference: plain "
                    "PyTorch, on any device and slow. A backend chosen by name is never replaced.",
                ),
                io.Combo.Input(
                    "token_order",
                    options=list(TOKEN_ORDERS),
                    default="raster",
                    optional=True,
                    tooltip="Which tokens of a frame make a block. raster: strips of rows, as "
                    "released; tiles: compact pieces of the picture. Cannot change in mid-run.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
            hidden=[io.Hidden.unique_id],
            # Its result names the node, which a cached one of another node would not.
            not_idempotent=True,
            search_aliases=["sparse attention", "block sparse", "light forcing", "faster wan"],
        )

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = None,
        schedule: str | None = None,
        policy: str | None = None,
        block_size: str | None = None,
        plan: str | None = None,
        backend: str | None = None,
        token_order: str | None = None,
    ) -> bool | str:
        return check_choices(
            cls,
            preset=preset,
            schedule=schedule,
            policy=policy,
            block_size=block_size,
            plan=plan,
            backend=backend,
            token_order=token_order,
        )

    @classmethod
    def execute(cls, model: Any, enabled: bool, **inputs: Any) -> io.NodeOutput:
        choice = SparseChoice(
            node_id=str(cls.hidden.unique_id),
            settings=sparse_settings(**inputs),
            enabled=enabled,
        )
        return io.NodeOutput(patch_model(model, choice))
