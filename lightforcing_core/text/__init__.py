"""Prompt encoders."""
