"""Source -> rows -> text -> tokens -> shards -> order -> batch, a module each. Knows nothing of ranks or models."""
