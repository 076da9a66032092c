"""Generation, evaluation and samples."""
