"""Benchmarks against the alternatives, and calibration for `smolds plan`."""
