"""Corpus -> tokenizer -> packed token shards -> (global sample index -> batch). Knows nothing of ranks or models."""
