"""In this folder kernels run on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches look at the variable again."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=["float32", "float16"] if INTERPRETED else ["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Types the Triton kernels do here: the interpreter has no bfloat16, a GPU no float32."""
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated but never written shows up as NaN, or as an absurd number."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point():
                x.fill_(float("nan"))
            elif x.dtype in (torch.int32, torch.int64):
                x.fill_(123456789)
            return x

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
