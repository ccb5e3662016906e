"""Load Model: an autoregressive Wan checkpoint, or the embedded model, as MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..lightforcing_core.checkpoints.families import FAMILIES
from ..lightforcing_core.embedded import EMBEDDED_MODEL
from .adapter.embedded import OwnPart, embedded_clip, embedded_vae
from .adapter.loading import ModelRequest, load_model
from .schema import check_choices, node_schema

log = logging.getLogger("lightforcing")

EMBEDDED = "embedded model (256x128, no download)"
_FOLDER = "diffusion_models"
_NO_LORA = "none"
_FROM_FILE = "from the file"
_TYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


class LoadModel(io.ComfyNode):
    """Any supported autoregressive checkpoint to a MODEL, with the settings it was trained for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingLoadModel",
            display_name="Load Model (Light Forcing)",
            description=(
                "Loads an autoregressive Wan 2.1 checkpoint (Self Forcing, Causal Forcing, LongLive"
                ", ...) in any published layout, .pt or .safetensors, from models/diffusion_models;"
                " or the small model that comes with the nodes. Sets the shift, and hands the "
                "chunk length, window and sink it was trained for to Chunk Sampler."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[EMBEDDED, *folder_paths.get_filename_list(_FOLDER)],
                    default=EMBEDDED,
                    tooltip="A file of models/diffusion_models. The embedded model needs no "
                    "download and no other file: it draws moving shapes at 256x128 pixels.",
                ),
                io.Combo.Input(
                    "family",
                    options=[_FROM_FILE, *(family.name for family in FAMILIES)],
                    default=_FROM_FILE,
                    tooltip="Which published weights these are, which decides chunk length, window,"
                    " sink and shift. The file's metadata or name usually says it.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(_TYPES),
                    default="auto",
                    tooltip="Number type the weights are kept in. auto: bfloat16 where the device "
                    "computes in it. fp8_e4m3fn halves that memory and costs some quality.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[_NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=_NO_LORA,
                    tooltip="A LoRA of models/loras to merge into the weights in float32 (LongLive "
                    "and MemFlow need theirs). For others, ComfyUI's LoRA loaders work too.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly the LoRA is merged, -10 to 10; 1 is as trained, 0 off.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="The embedded model's text encoder. For a checkpoint of your own use "
                    "Load CLIP.",
                ),
                io.Vae.Output(
                    display_name="VAE",
                    tooltip="The embedded model's autoencoder. For a checkpoint of your own use "
                    "Load VAE.",
                ),
            ],
            search_aliases=["self forcing", "causal forcing", "longlive", "wan autoregressive"],
        )

    @classmethod
    def validate_inputs(
        cls,
        model_name: str | None = None,
        family: str | None = None,
        weight_dtype: str | None = None,
        lora: str | None = None,
    ) -> bool | str:
        return check_choices(
            cls,
            model_name=model_name,
            family=family,
            weight_dtype=weight_dtype,
            lora=lora,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> tuple[Any, ...]:
        """Inputs and what the files look like, so that a replaced file is loaded again."""
        paths = [_model_path(inputs["model_name"]), *_lora_paths(inputs["lora"])]
        stats = [path.stat() for path in paths if path.exists()]
        return (*inputs.values(), *((stat.st_mtime_ns, stat.st_size) for stat in stats))

    @classmethod
    def execute(
        cls, model_name: str, family: str, weight_dtype: str, lora: str, lora_strength: float
    ) -> io.NodeOutput:
        loaded = load_model(
            ModelRequest(
                path=_model_path(model_name),
                family=None if family == _FROM_FILE else family,
                loras=[(path, lora_strength) for path in _lora_paths(lora)],
                weight_dtype=_TYPES[weight_dtype],
            )
        )
        for note in loaded.notes:
            log.warning(note.replace("--", ""))  # notes name the command's options: --family
        if model_name == EMBEDDED:
            return io.NodeOutput(loaded.patcher, embedded_clip(), embedded_vae())
        return io.NodeOutput(loaded.patcher, OwnPart.clip(model_name), OwnPart.vae(model_name))


def _model_path(name: str) -> Path:
    if name == EMBEDDED:
        return EMBEDDED_MODEL
    return Path(folder_paths.get_full_path_or_raise(_FOLDER, name))


def _lora_paths(name: str) -> list[Path]:
    if name == _NO_LORA:
        return []
    return [Path(folder_paths.get_full_path_or_raise("loras", name))]
