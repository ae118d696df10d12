"""Trains the audio tokenizers: spectral and SEANet, their recipe and health."""
