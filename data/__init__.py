"""Turns text into token shards (sources, tokenizer, inject, shards) and shards into batches (loader).

Prepared datasets are stored beside this code, in data/<name>/, and are not in git."""
