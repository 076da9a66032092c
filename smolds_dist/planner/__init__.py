"""What a run will need and take, before it is paid for: memory, time and traffic, counted from the configuration.

Imports neither torch nor transformers, and nothing that knows ranks: the launcher's "auto" settings rest on it.
"""
