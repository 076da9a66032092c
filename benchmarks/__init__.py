"""Benchmarks to run by hand from the root of a checkout: `python -m benchmarks NAME --help`; not installed.

`results/` has their results, which docs/benchmarks.md explains. `smolds bench train` is part of the package.
"""
