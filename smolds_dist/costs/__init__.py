"""Formulas for a layout's memory and time, from the configuration alone; topology and planner share them.

Imports neither torch nor transformers: the launcher's "auto" settings need it.
"""
