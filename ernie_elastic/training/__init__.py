"""Trains the backbone (DeepSpeed over torchrun) and the tokenizers."""
