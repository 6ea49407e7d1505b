"""Inference with a trained run: text generation, its KV cache, and scoring of given texts."""
