"""Text sources, tokenizers, token shards and the step-indexed loader."""
