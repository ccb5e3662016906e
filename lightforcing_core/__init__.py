"""The method and the runtime; knows neither ComfyUI nor Triton."""
