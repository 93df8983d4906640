"""The transformers side: importing this registers MobiLlama with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from mobillama.directory import MODEL_TYPE
from mobillama.hf.configuration import MobiLlamaConfig
from mobillama.hf.modeling import MobiLlamaForCausalLM
from mobillama.hf.unshare import unshare

AutoConfig.register(MODEL_TYPE, MobiLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(MobiLlamaConfig, MobiLlamaForCausalLM, exist_ok=True)

__all__ = ["MobiLlamaConfig", "MobiLlamaForCausalLM", "unshare"]
