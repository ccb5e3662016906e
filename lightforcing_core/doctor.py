"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from .backends import list_backends
from .embedded import EMBEDDED_MODEL, EMBEDDED_TEXT, EMBEDDED_VAE
from .memory import GIB, available_bytes


@dataclass(frozen=True)
class Backend:
    """Something that may or may not work here, and the reason."""

    name: str
    available: bool
    reason: str


def examine() -> dict[str, Any]:
    """Devices, versions and backends of this machine, as JSON-ready data."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": [asdict(backend) for backend in _backends()],
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("lightforcing", "numpy", "safetensors", "imageio-ffmpeg", "transformers")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which build, unlike the package's metadata
        **{name: version(name) for name in packages},
    }


def _devices() -> list[dict[str, Any]]:
    devices = [
        {
            "name": "cpu",
            "model": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
            "free_gib": round(available_bytes(torch.device("cpu")) / GIB, 1),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / GIB, 1),
                "free_gib": round(available_bytes(torch.device("cuda", index)) / GIB, 1),
            }
        )
    return devices


def _backends() -> list[Backend]:
    return [
        Backend("attention: torch SDPA on cpu", True, "dense attention, always there"),
        _cuda_attention(),
        *(Backend(s.name, s.available, s.reason) for s in list_backends()),
        _ffmpeg(),
        _umt5(),
        _embedded(),
    ]


def _cuda_attention() -> Backend:
    name = "attention: torch SDPA on cuda"
    if torch.version.cuda is None:
        return Backend(name, False, f"torch {torch.__version__} is a build without CUDA")
    if not torch.cuda.is_available():
        return Backend(name, False, "torch sees no CUDA device")
    return Backend(name, True, f"dense attention, CUDA {torch.version.cuda}")


def _ffmpeg() -> Backend:
    name = "mp4 writing: ffmpeg"
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return Backend(name, False, "imageio-ffmpeg is not installed: pip install imageio-ffmpeg")
    import imageio_ffmpeg

    try:
        return Backend(name, True, imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        found = shutil.which("ffmpeg")
        return Backend(name, found is not None, found or str(error))


def _umt5() -> Backend:
    name = "text encoder: UMT5 (Wan checkpoints)"
    missing = [p for p in ("transformers", "sentencepiece") if not importlib.util.find_spec(p)]
    if missing:
        return Backend(name, False, f"not installed: pip install {' '.join(missing)}")
    return Backend(name, True, "transformers and sentencepiece are installed")


def _embedded() -> Backend:
    name = "embedded model"
    files: list[Path] = [EMBEDDED_MODEL, EMBEDDED_VAE, EMBEDDED_TEXT]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return Backend(name, False, f"missing from models/: {', '.join(missing)}")
    return Backend(name, True, f"{sum(f.stat().st_size for f in files) / 2**20:.1f} MiB")
