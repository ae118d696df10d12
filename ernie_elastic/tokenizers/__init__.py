"""Media and text to discrete tokens and back: `text`, `visual`, `audio`; trained in `tokenizer_training/`."""
