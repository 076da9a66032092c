"""The SmolLM2-DeepSeek model: transformers classes, registered with the Auto classes; independent of ranks."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from smolds_dist.model.configuration import DeepSeekV3Config
from smolds_dist.model.modeling import (
    DeepSeekV3Block,
    DeepSeekV3ForCausalLM,
    DeepSeekV3Model,
    RMSNorm,
    change_rotary,
    empty_model,
    enable_activation_checkpointing,
)
from smolds_dist.model.moe import TopKRouter

AutoConfig.register(DeepSeekV3Config.model_type, DeepSeekV3Config, exist_ok=True)
AutoModel.register(DeepSeekV3Config, DeepSeekV3Model, exist_ok=True)
AutoModelForCausalLM.register(DeepSeekV3Config, DeepSeekV3ForCausalLM, exist_ok=True)

__all__ = [
    "DeepSeekV3Block",
    "DeepSeekV3Config",
    "DeepSeekV3ForCausalLM",
    "RMSNorm",
    "TopKRouter",
    "change_rotary",
    "empty_model",
    "enable_activation_checkpointing",
]
