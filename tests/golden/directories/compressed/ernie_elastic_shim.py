"""Loads this checkpoint's classes from the installed ernie_elastic package."""
try:
    from ernie_elastic.modeling import (
        ErnieElasticConfig,
        ErnieElasticForCausalLM,
        ErnieElasticModel,
        ErnieElasticProcessor,
    )
except ImportError as error:
    raise ImportError("this checkpoint needs the package ernie_elastic: run `pip install ernie-elastic`") from error
