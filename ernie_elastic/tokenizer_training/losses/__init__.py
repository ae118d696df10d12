"""Losses of reconstructions: spectral, perceptual, adversarial."""
