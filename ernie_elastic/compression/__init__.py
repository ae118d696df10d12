"""Lossless weight compression of any Hugging Face directory."""
