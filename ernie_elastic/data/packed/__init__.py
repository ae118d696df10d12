"""Packed rows: shards on disk, rows of documents, their order, mixtures, and the loader."""
