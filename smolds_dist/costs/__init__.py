"""Formulas for what a layout needs and takes, from the configuration alone; topology and planner share them.

Imports neither torch nor transformers: the launcher's "auto" settings rest on it.
"""
