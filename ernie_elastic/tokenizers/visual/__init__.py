"""Pictures and clips to multi-scale bits and back: the interface, the patch and the convolutional tokenizer."""
