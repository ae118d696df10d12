"""The stage `prepare-data`: records are tokenised by a pool of processes and written as shards."""
