"""Start, watch and stop ranks, and check the machine."""
