"""Where records come from: folders, saved datasets, Parquet, JSONL, CSV and tar files."""
