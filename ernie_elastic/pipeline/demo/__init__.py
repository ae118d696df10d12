"""The whole pipeline on the embedded world, and its page."""
