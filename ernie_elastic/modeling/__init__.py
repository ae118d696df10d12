"""The elastic multimodal MoE: a Transformers model first, with one packed entry for every modality.

Importing this package registers the classes with Transformers' Auto classes. It is the public face of the stack, which
lies here, and of the causal model, which stands above in `generation/` and is handed on: Transformers knows no way to
register a class by its name alone.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

import ernie_elastic.compression
import ernie_elastic.tokenizers.text.hugging_face  # noqa: F401 - both register classes with the Auto classes
from ernie_elastic.generation.causal_lm import ErnieElasticForCausalLM
from ernie_elastic.kernels import sorted_experts
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.model import ErnieElasticModel
from ernie_elastic.modeling.processing import ErnieElasticProcessor

__all__ = ["ErnieElasticConfig", "ErnieElasticForCausalLM", "ErnieElasticModel", "ErnieElasticProcessor"]

sorted_experts.register()
AutoConfig.register(ErnieElasticConfig.model_type, ErnieElasticConfig, exist_ok=True)
AutoModel.register(ErnieElasticConfig, ErnieElasticModel, exist_ok=True)
AutoModelForCausalLM.register(ErnieElasticConfig, ErnieElasticForCausalLM, exist_ok=True)
AutoProcessor.register(ErnieElasticConfig, ErnieElasticProcessor, exist_ok=True)
