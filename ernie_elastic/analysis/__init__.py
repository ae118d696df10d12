"""Reads routing traces, draws figures; knows nothing of our model."""
