"""Benchmarks that are run by hand, from the root of a checkout: `python -m benchmarks NAME --help`; not installed.

`results/` has what they measured, docs/benchmarks.md what that says. `smolds bench train` is part of the package.
"""
