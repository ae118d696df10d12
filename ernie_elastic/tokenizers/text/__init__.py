"""Text to ids and back: UTF-16BE bytes, their merges, the tokenizer, and its form for Transformers."""
