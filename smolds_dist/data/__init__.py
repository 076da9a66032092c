"""Source -> rows -> text -> tokens -> shards -> order -> batch, one module each; independent of ranks and models."""
