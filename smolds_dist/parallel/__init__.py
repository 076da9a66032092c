"""Ranks: the topology, the engines, expert parallelism and balancing. Knows nothing of text."""
