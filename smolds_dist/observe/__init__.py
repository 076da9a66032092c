"""What a run shows of itself: rows, curves, pictures, lines."""
