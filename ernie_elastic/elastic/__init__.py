"""What may shrink, how it is sampled while training, and how a smaller model is cut out."""
