"""Checkpoints: file format, writing, resuming, and `smolds checkpoint`."""
