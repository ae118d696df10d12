"""One folder per operation; the only place that imports triton."""
