"""The nodes that ComfyUI sees."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .benchmark import Benchmark
from .chunk_sampler import ChunkSamplerNode
from .compare import Compare
from .growth_schedule import GrowthSchedule
from .load_model import LoadModel
from .prompt_schedule import PromptScheduleNode
from .routes import add_routes
from .sparse_attention import PRESET_VALUES, SparseAttention, read_settings
from .sparsity_map import SparsityMap
from .stream import StreamVideo
from .vae import StreamingDecode, StreamingEncode


class LightForcingExtension(ComfyExtension):
    """The node classes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadModel,
            SparseAttention,
            ChunkSamplerNode,
            StreamVideo,
            PromptScheduleNode,
            StreamingDecode,
            StreamingEncode,
            GrowthSchedule,
            SparsityMap,
            Compare,
            Benchmark,
        ]


async def comfy_entrypoint() -> LightForcingExtension:
    """What ComfyUI calls when it has imported the pack."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:  # None: nodes are used without a server
        add_routes(server, read_settings, PRESET_VALUES)
    return LightForcingExtension()
