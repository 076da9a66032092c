"""Checkpoints: files, writing, resuming, and the command for them."""
