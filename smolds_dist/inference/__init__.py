"""What a model says and how well: generation, evaluation, samples."""
