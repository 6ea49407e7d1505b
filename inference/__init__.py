"""Using a trained run: generation, its cache of keys and values, and scoring."""
