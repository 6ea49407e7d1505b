"""Takes trained runs elsewhere: exports them to Hugging Face transformers, with tasks for lm-eval."""
