"""The Wan denoiser: plain module tree, rotary positions, and one forward for every host."""
