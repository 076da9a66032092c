"""smolds: pre-trains SmolLM2-DeepSeek language models with expert parallelism."""
