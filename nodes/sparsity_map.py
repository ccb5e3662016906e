"""Sparsity Map: which blocks each query block saw, as a picture."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..lightforcing_core.errors import UserError
from ..lightforcing_core.selection_record import SelectionRecord
from ..lightforcing_core.sparsity_map import draw_sparsity_map
from .schema import node_schema
from .stream import SELECTION


class SparsityMap(io.ComfyNode):
    """Draws what Stream Video recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingSparsityMap",
            display_name="Sparsity Map (Light Forcing)",
            description=(
                "Draws which key blocks each query block saw, by chunk, layer and head. Connect "
                "the SELECTION of a Stream Video whose record_selection is on."
            ),
            inputs=[
                SELECTION.Input("selection", tooltip="From Stream Video, record_selection on."),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Chunk to draw, the first is 1. 0: all of them.",
                ),
                io.Int.Input(
                    "layer",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Transformer layer, the first is 1. 0: the mean over all.",
                ),
                io.Int.Input(
                    "head",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Attention head, the first is 1. 0: the mean over all.",
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
            is_output_node=True,
            search_aliases=["attention map", "block mask", "visualize attention"],
        )

    @classmethod
    def execute(
        cls, selection: tuple[SelectionRecord, ...], chunk: int, layer: int, head: int
    ) -> io.NodeOutput:
        picture = draw_sparsity_map(
            _chosen(selection, chunk),
            layer=layer - 1 if layer else None,
            head=head - 1 if head else None,
        )
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def _chosen(selection: tuple[SelectionRecord, ...], chunk: int) -> tuple[SelectionRecord, ...]:
    if not selection:
        raise UserError(
            "nothing was recorded: switch record_selection of Stream Video on, and have a Sparse "
            "Attention node before it"
        )
    if chunk > len(selection):
        raise UserError(
            f"there is no chunk {chunk}: {len(selection)} were recorded; choose 1 to "
            f"{len(selection)}, or 0 for all"
        )
    return selection[chunk - 1 : chunk] if chunk else selection
