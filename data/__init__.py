"""Text to token shards and back: sources -> tokenizer -> inject -> shards -> loader.

Prepared datasets lie beside this code in data/<name>/ and are not in git."""
