"""Trains the refiner that makes decoded pictures larger and sharper."""
