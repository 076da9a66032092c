"""Our weights for a model of transformers' classes, to compare both."""

from torch import Tensor

from smolds_dist.interchange.transformers_format import model_type, to_transformers
from smolds_dist.model import DeepSeekV3Config


def transformers_state_dict(state: dict[str, Tensor], config: DeepSeekV3Config) -> dict[str, Tensor]:
    """Return our parameters and selection biases, experts stacked, under the names of transformers' model."""
    renamed = [to_transformers(name, tensor, config, model_type(config)) for name, tensor in state.items()]
    return {
        name.replace(".mlp.moe_statics.", ".mlp.gate.moe_statics."): tensor
        for name, tensor in (one for one in renamed if one is not None)
    }
