"""Prompt Schedule: prompts with start times."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.prompts import PromptSchedule, parse_prompts, schedule_conditioning
from .schema import node_schema


class PromptScheduleNode(io.ComfyNode):
    """Encodes several prompts, each from its time on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingPromptSchedule",
            display_name="Prompt Schedule (Light Forcing)",
            description=(
                "Prompts that follow each other in one video. From the first chunk that begins at "
                "or after its time, a prompt holds until the next one; what was made before it "
                "stays in view, so the change is gradual. Other samplers use the first prompt."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="0: a red circle moves right\n2.5: a blue square moves left",
                    tooltip="One prompt a line, as 'SECONDS: PROMPT', at 16 pictures a second, in "
                    "order, the first at 0. A line without a time goes on with the one before.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
            search_aliases=["prompt travel", "prompt switch", "multi prompt", "story"],
        )

    @classmethod
    def execute(cls, clip: Any, prompts: str) -> io.NodeOutput:
        parsed = parse_prompts(prompts)
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for _, text in parsed]
        schedule = PromptSchedule(
            tuple(start for start, _ in parsed), tuple(embeds for embeds, _ in encoded)
        )
        return io.NodeOutput(schedule_conditioning(schedule, encoded[0][1]))
