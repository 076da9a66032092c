"""AutoEP's options: the faster ones of a GPU, and checks of those in a user's DeepSpeed file."""

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from smolds_dist.costs.memory import fuses_gate_up
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.topology import Topology

# Options that change how a step is computed. All other options describe the model or the layout.
FREE = (
    "use_grouped_mm", "disable_triton_grouped_mm", "gate_up_impl", "combine_impl", "row_weighting_impl",
    "async_split_plan", "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank",
    "validate_folding_routing",
)  # fmt: skip


def known_options() -> dict[str, Any]:
    """Return the options of the installed AutoEP with their defaults."""
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    # A plain object marks an option that was not set.
    return {f.name: None if type(f.default) is object else f.default for f in fields(AutoEPConfig) if f.init}


def fixed_options(path: Path, keys: set[str]) -> dict[str, Any]:
    """Return the values that a run needs of those options in `keys` that are not `FREE`: AutoEP's defaults.

    Raises:
        ConfigError: for an option that the installed AutoEP does not have.
    """
    known = known_options()
    if unknown := sorted(keys - set(known)):
        raise ConfigError(
            f"{path} sets expert_parallel.{unknown[0]}, which the installed DeepSpeed does not know; remove it, or use one "
            f"of {', '.join(key for key in FREE if key in known)}."
        )
    return {key: known[key] for key in keys - set(FREE)}


def fast_paths(topology: Topology, model: Any, tokens: int, own: dict[str, Any]) -> dict[str, Any]:
    """Return the user's options in `own`, and the faster ones that fit them, the device and the installed DeepSpeed.

    On the CPU our kernel replaces the loop that runs without `use_grouped_mm`. On CUDA (untested there):

    - `use_grouped_mm`: one grouped matmul for all experts of a rank.
    - `gate_up_impl: fused`: one grouped matmul for gate and up projections; only with PyTorch's grouped matmul, which
      DeepSpeed uses from compute capability 9.0, and if `costs.memory.fuses_gate_up`. Parameters stay separate.
    - `combine_impl: fused_weighted_sum`: one Triton kernel restores the order of expert outputs and sums them in fp32.
    - `async_split_plan`: the copy of row counts to the host overlaps the packing of rows.
    - `comm_backend: deepep`: DeepEP's all-to-all, if the package and hardware support it (`has_deepep`), in bf16. It weights
      and sums rows itself.

    Args:
        model: `DeepSeekV3Config` or `settings.Model`.
        tokens: the most tokens of one rank in a forward pass.
    """
    limit = {"comm_max_tokens_per_rank": tokens}
    if topology.device != "cuda":
        return {"use_grouped_mm": False} | (limit if own.get("comm_backend") == "deepep" else {}) | own
    chosen = {"use_grouped_mm": hasattr(torch, "_grouped_mm")} | own
    try:
        from deepspeed.accelerator import get_accelerator
        from deepspeed.ops.triton_ops import autoep_fused_token_ops as fused
    except ImportError:  # a DeepSpeed without these options
        return chosen
    several, known = topology.expert > 1, known_options()
    asked = {"comm_backend", "combine_impl"} & set(own)
    if several and topology.dtype == "bf16" and "comm_backend" in known and not asked and has_deepep():
        chosen["comm_backend"] = "deepep"
    if deepep := chosen.get("comm_backend") == "deepep":
        chosen = limit | chosen
    native = chosen.get("disable_triton_grouped_mm") or not get_accelerator().prefer_triton_grouped_mm()
    worth = fuses_gate_up(model, tokens, topology.expert)
    faster = {
        "gate_up_impl": "fused" if chosen["use_grouped_mm"] and native and worth else "separate",
        "combine_impl": "fused_weighted_sum" if fused.is_available() and not (deepep and several) else "auto",
        "async_split_plan": several and not deepep,
    }
    return {key: value for key, value in faster.items() if key in known} | chosen


def has_deepep() -> bool:
    """Return True if the DeepEP that AutoEP calls is installed, and GPU and NCCL support it. Untested on CUDA."""
    from deepspeed.module_inject.auto_ep_comm import NCCL_GIN_MIN_VERSION

    if importlib.util.find_spec("deep_ep") is None:
        return False
    try:
        import deep_ep

        supported = torch.cuda.get_device_capability() >= (9, 0) and torch.cuda.nccl.version() >= NCCL_GIN_MIN_VERSION
        return supported and hasattr(deep_ep, "ElasticBuffer")
    except Exception:  # a package that cannot be loaded, or a PyTorch without CUDA or NCCL
        return False


def check_options(path: Path, section: dict[str, Any], topology: Topology) -> None:
    """Raise a `ConfigError` if DeepSpeed would reject `section` of the user's file now, for its layers or in a step."""
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.ops.triton_ops import autoep_fused_token_ops as fused
    from deepspeed.utils import logger

    cuda, alone = topology.device == "cuda", topology.expert == 1
    deepep = cuda and topology.dtype == "bf16" and importlib.util.find_spec("deep_ep") is not None
    needs = {
        "combine_impl": ("fused_weighted_sum", cuda and fused.is_available(), "NVIDIA GPUs and Triton"),
        "async_split_plan": (True, cuda or alone, "NVIDIA GPUs"),
        "comm_backend": ("deepep", deepep or alone, "NVIDIA GPUs, --train.dtype bf16 and the package deep_ep"),
    }
    for key, (value, works, needed) in needs.items():
        if section.get(key) == value and not works:
            raise ConfigError(f"{path} sets expert_parallel.{key} to {value!r}, which needs {needed}; remove it.")
    for key, default in known_options().items():  # DeepSpeed would take "false" for true
        if isinstance(default, bool) and not isinstance(section.get(key, default), bool):
            raise ConfigError(f"{path} sets expert_parallel.{key} to {section[key]!r}; use true or false.")
    level = logger.level
    logger.setLevel("ERROR")  # its warnings come again when training starts
    try:
        parsed = parse_autoep_config(section)
        validate_autoep_config(parsed, topology.world_size, 1, 1, 1, zero_stage=topology.zero)
        options = (parsed.use_grouped_mm, parsed.disable_triton_grouped_mm)
        GroupedExperts(8, 8, 1, *options, gate_up_impl=parsed.gate_up_impl)
    except Exception as error:  # of any type, because DeepSpeed does not check types
        raise ConfigError(f"{path}: expert_parallel: {' '.join(str(error).split()).rstrip('.')}; fix it.") from None
    finally:
        logger.setLevel(level)
