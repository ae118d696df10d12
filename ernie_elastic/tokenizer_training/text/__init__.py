"""Learns a text vocabulary, from the embedded world or from data."""
