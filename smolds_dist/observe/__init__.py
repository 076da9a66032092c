"""Rows of metrics, curves, plots and reports of runs."""
