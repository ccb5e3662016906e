"""The nodes that ComfyUI sees."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .chunk_sampler import ChunkSamplerNode
from .growth_schedule import GrowthSchedule
from .load_model import LoadModel
from .prompt_schedule import PromptScheduleNode
from .sparse_attention import SparseAttention
from .vae import StreamingDecode, StreamingEncode


class LightForcingExtension(ComfyExtension):
    """The node classes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadModel,
            SparseAttention,
            ChunkSamplerNode,
            PromptScheduleNode,
            StreamingDecode,
            StreamingEncode,
            GrowthSchedule,
        ]


async def comfy_entrypoint() -> LightForcingExtension:
    """What ComfyUI calls when it has imported the pack."""
    return LightForcingExtension()
