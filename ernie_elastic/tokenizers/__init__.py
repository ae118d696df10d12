"""Media and text to discrete tokens and back; trained in `training/tokenizer_*`."""
