"""Where the small model that ships with the package lies."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "models"
EMBEDDED_MODEL = _FOLDER / "lightforcing_mini_256x128.safetensors"
EMBEDDED_VAE = _FOLDER / "lightforcing_mini_vae.safetensors"
EMBEDDED_TEXT = _FOLDER / "lightforcing_mini_text.safetensors"
