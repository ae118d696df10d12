"""Sound to residual codes and back: the interface, spectral and SEANet tokenizers, adapters of Transformers' codecs."""
