"""Memory, time and the best layout of a run on machines that you do not have yet."""
