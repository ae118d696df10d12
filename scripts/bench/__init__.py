"""Benchmarks: one file each, found by `run.py`; `common.py` says what such a file contains."""
