"""One run of the chunk sampler: forwards through ComfyUI's guider, progress, interrupts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...lightforcing_core.chunk import ModelCall
from ...lightforcing_core.errors import UserError
from ...lightforcing_core.timesteps import TRAIN_TIMESTEPS
from ...lightforcing_core.wan.forward import TextContext, prepare_text
from .prompts import prompt_at, schedule_of

StepCallback = Callable[[int, Tensor, Tensor, int], None]
_KEY = "lightforcing"


class ChunkRun:
    """The rollout's host: runs each forward through the guider, and answers where the model would.

    It hooks in as a wrapper around the diffusion model in the options of this one run, innermost,
    so nothing is left on the MODEL and every other node's wrapper sees an ordinary model call.
    """

    def __init__(
        self,
        model_wrap: Any,
        extra_args: dict[str, Any],
        callback: StepCallback | None,
        total_steps: int,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            model_wrap: the guider; its conditions are this run's own copies.
            extra_args: what it gave its sampler; its model options are this run's own copy.
            callback: told of every denoising step.
            total_steps: denoising steps of the whole video.
            dtype: of the forwards.
        """
        self._model = model_wrap
        self._extra_args = extra_args
        self._callback = callback
        self._total_steps = total_steps
        self._steps_done = 0
        self._call: ModelCall | None = None
        self._answers = 0
        conds = model_wrap.conds.get("positive", [])
        self._schedule = schedule_of(conds)
        _bring_prompts(conds, model_wrap.model_patcher.load_device, dtype)
        self._texts: dict[int, TextContext] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> ChunkRun:
        options = self._extra_args["model_options"]["transformer_options"]
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, self._answer, options)
        return self

    def __exit__(self, *exc_info: object) -> None:
        options = self._extra_args["model_options"]["transformer_options"]
        options["wrappers"][WrappersMP.DIFFUSION_MODEL][_KEY].remove(self._answer)
        self._texts.clear()
        self._last = None

    def __call__(self, call: ModelCall) -> Tensor:
        """A `ModelHost`: clean latents, float32, through the guider."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._call, self._answers = call, 0
        x = call.latents
        sigma = torch.full((x.shape[0],), call.timestep / TRAIN_TIMESTEPS, device=x.device)
        options = {k: v for k, v in self._extra_args.items() if k in ("model_options", "seed")}
        denoised = self._model(x, sigma, **options)
        self._call = None
        if self._answers != 1:
            raise UserError(
                f"the model ran {self._answers} times in one forward of a chunk, expected once; "
                "remove nodes that skip, repeat or window model calls (caches such as EasyCache, "
                "context windows, combined conditionings)"
            )
        denoised = denoised.float()
        if call.step is not None:
            self._report(denoised, x)
        return denoised

    def chunk_done(self, parts: Sequence[Tensor]) -> None:
        """After the last chunk, hand the whole video to whoever keeps the latest clean latents."""
        if self._callback is None or self._steps_done < self._total_steps or self._last is None:
            return
        video = torch.cat(list(parts), dim=2)
        self._callback(self._total_steps - 1, video, video, self._total_steps)

    def _report(self, denoised: Tensor, noisy: Tensor) -> None:
        self._last = (denoised, noisy)
        if self._callback is not None:
            self._callback(self._steps_done, denoised, noisy, self._total_steps)
        self._steps_done += 1

    def _answer(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *others: object,
        **more: object,
    ) -> Tensor:
        """In place of the diffusion model's own forward; x is in the dtype it computes in."""
        call = self._call
        if call is None:
            raise RuntimeError("the model ran outside of a forward of the chunk sampler")
        if x.shape != call.latents.shape:
            raise UserError(
                f"the model was asked for {list(x.shape)} where the chunk has "
                f"{list(call.latents.shape)}: a negative prompt or several prompts run beside the "
                "positive one; autoregressive models take one prompt and guidance 1, so use "
                "BasicGuider"
            )
        self._answers += 1
        return call.velocity(x, self._text(executor.class_obj, context, call.frames[0]))

    def _text(self, tree: torch.nn.Module, context: Tensor, frame: int) -> TextContext:
        """The prompt of a chunk that starts at a frame, projected once in a run."""
        number, embeds = 0, context
        if self._schedule is not None:
            number, embeds = prompt_at(self._schedule, frame)
        if number not in self._texts:
            embeds = embeds.to(context).expand(context.shape[0], -1, -1)
            self._texts[number] = prepare_text(tree, embeds)
        return self._texts[number]


def _bring_prompts(
    conds: Sequence[dict[str, Any]], device: torch.device, dtype: torch.dtype
) -> None:
    """Have prompts where and as the model takes them.

    ComfyUI leaves them in the host's memory and sends them with every forward, for which the host
    waits until the device has done all that was asked of it before.
    """
    for cond in conds:
        found = cond.get("model_conds", {})
        prompt = found.get("c_crossattn")
        if isinstance(getattr(prompt, "cond", None), Tensor):
            found["c_crossattn"] = prompt._copy_with(prompt.cond.to(device, dtype))
