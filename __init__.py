"""Light Forcing: autoregressive Wan video with sparse attention."""

from importlib.util import find_spec

# Only inside ComfyUI: the command line and the tests import this package without it.
if __package__ and find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./web"
