"""Trains the visual tokenizers: patch and convolutional, their recipe, settings and health."""
