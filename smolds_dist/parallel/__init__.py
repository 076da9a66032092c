"""Topology, engines, expert parallelism and balancing; independent of text."""
