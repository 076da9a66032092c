"""What a run will need and take, before it is paid for: the best layout on machines that nobody has yet."""
