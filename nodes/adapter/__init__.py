"""The only place that knows ComfyUI's internals.

Nodes are thin: they read inputs, call a function here or in the core, and hand results on. What
other nodes need:

- `load_model`; `embedded_clip`, `embedded_vae`: files to MODEL, CLIP and VAE (`loading`,
  `embedded`).
- `patch_model`, `sparse_of`: sparse attention's settings on a MODEL (`patching`, `options`).
- `ChunkSettings`, `ChunkSampler`, `sample_chunks`: making a video (`sampler`). A `Watch` follows
  the run: it gets every chunk as it is done and may change its sparsity (`watching`).
- `streaming_vae`: any supported VAE as a `VideoVAE` that decodes chunk by chunk (`video_vae`);
  `decoding`: that, beside the sampling of a run (`decoding`).
"""
