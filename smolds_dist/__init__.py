"""smolds: pre-train SmolLM2-DeepSeek language models with expert parallelism.

from smolds_dist import load_config, train

result = train(load_config(["--preset", "debug", "--run.name", "first"]))
print(result.val_loss, result.export)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolds_dist.config import load_config as load_config
    from smolds_dist.errors import ConfigError as ConfigError
    from smolds_dist.model import DeepSeekV3Config as DeepSeekV3Config
    from smolds_dist.model import DeepSeekV3ForCausalLM as DeepSeekV3ForCausalLM
    from smolds_dist.settings import RunConfig as RunConfig
    from smolds_dist.training.library import RunResult as RunResult
    from smolds_dist.training.library import launch as launch
    from smolds_dist.training.library import train as train

# Public names, by module.
_HOME = {
    "ConfigError": "errors", "RunConfig": "config", "load_config": "config", "RunResult": "training.library",
    "launch": "training.library", "train": "training.library", "DeepSeekV3Config": "model", "DeepSeekV3ForCausalLM": "model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
