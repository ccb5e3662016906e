"""Streaming VAE Decode and Encode: whole videos in constant memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .adapter.video_vae import decode_video, encode_video
from .schema import node_schema


class StreamingDecode(io.ComfyNode):
    """A video LATENT to pictures, a few latent frames at a time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingStreamingVAEDecode",
            display_name="Streaming VAE Decode (Light Forcing)",
            description=(
                "Decodes a Wan 2.1 video of any length in constant GPU memory: three latent frames "
                "at a time, with what the decoder remembers between them, so there are no seams. "
                "For the Wan 2.1 VAE, LightVAE, TAEHV files and the embedded model's VAE."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="A video latent of a Wan 2.1 model."),
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE, LightVAE, TAEHV or the embedded one."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
            search_aliases=["vae decode long video", "chunked decode", "low memory decode"],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        return io.NodeOutput(decode_video(vae, samples["samples"]).flatten(0, 1))


class StreamingEncode(io.ComfyNode):
    """Pictures to a video LATENT, a few at a time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingStreamingVAEEncode",
            display_name="Streaming VAE Encode (Light Forcing)",
            description=(
                "Encodes a picture or a video of any length for a Wan 2.1 model in constant GPU "
                "memory. Takes the first 4k + 1 pictures, and crops to multiples of 8 pixels."
            ),
            inputs=[
                io.Image.Input("pixels", tooltip="A picture, or the pictures of one video."),
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE, LightVAE, TAEHV or the embedded one."),
            ],
            outputs=[io.Latent.Output(display_name="LATENT")],
            search_aliases=["vae encode video", "image to video latent", "initial latent"],
        )

    @classmethod
    def execute(cls, pixels: Tensor, vae: Any) -> io.NodeOutput:
        return io.NodeOutput({"samples": encode_video(vae, pixels)})
