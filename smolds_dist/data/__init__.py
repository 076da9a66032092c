"""Source -> rows -> text -> tokens -> units -> order -> batch, a module each. Knows nothing of ranks or models."""
