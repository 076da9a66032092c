"""Models out of here into other programs, and back."""
