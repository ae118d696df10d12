"""Loads this checkpoint's compressed weights with the installed ernie_elastic package."""
try:
    from ernie_elastic.compression import CompressedConfig
except ImportError as error:
    raise ImportError(
        "this checkpoint is losslessly compressed and needs the package ernie_elastic: run `pip install ernie-elastic`"
    ) from error
