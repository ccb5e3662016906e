"""Streaming video autoencoders with explicit state."""
