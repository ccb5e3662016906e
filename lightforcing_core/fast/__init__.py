"""What makes a rollout fast: fused pieces, CUDA graphs, eight-bit linear layers."""
