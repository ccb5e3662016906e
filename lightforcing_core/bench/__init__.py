"""Measurements: correctness first, all baselines in one run, medians with spread."""
