"""smolds: pre-trains SmolLM2-DeepSeek language models with expert parallelism.

from smolds_dist import load_config, train

result = train(load_config(["--preset", "debug", "--run.name", "first"]))
print(result.val_loss, result.export)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolds_dist.config import RunConfig, load_config
    from smolds_dist.errors import ConfigError
    from smolds_dist.library import RunResult, launch, train
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM

__all__ = [
    "ConfigError", "DeepSeekV3Config", "DeepSeekV3ForCausalLM", "RunConfig", "RunResult", "launch", "load_config", "train",
]  # fmt: skip

_HOME = {"ConfigError": "errors", "RunConfig": "config", "load_config": "config"}
_HOME |= {"DeepSeekV3Config": "model", "DeepSeekV3ForCausalLM": "model"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: torch and transformers take seconds, which no command should wait for in vain."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'library')}"), name)
