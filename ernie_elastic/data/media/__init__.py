"""Pictures, clips and sounds of files as arrays: decoding, resampling, degradation."""
