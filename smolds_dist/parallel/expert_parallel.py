"""DeepSpeed and AutoEP for our model: configuration and workarounds."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from msgspec import defstruct
from torch import Tensor, nn

from smolds_dist.costs.memory import BUCKET, PREFETCHED, SUB_GROUP
from smolds_dist.errors import ConfigError
from smolds_dist.inputs import convert, read_json
from smolds_dist.parallel.autoep_options import check_options, fast_paths, fixed_options
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import Model, RunConfig
from smolds_dist.stages import resolve_stages

if TYPE_CHECKING:  # importing the model takes a second, and the launcher does not need it
    from smolds_dist.model import DeepSeekV3Config


# Allowed offload devices. DeepSpeed (0.19.8) exposes only copies of state on disk and of offloaded weights, so checkpoints
# cannot restore either.
OFFLOADED = {"offload_optimizer": ("none", "cpu"), "offload_param": ("none",)}


# Sections read from a DeepSpeed configuration
SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "expert_parallel")
_Zero = defstruct("_Zero", [(name, dict[str, Any], None) for name in OFFLOADED], module=__name__)
_Sections = defstruct(
    "_Sections", [(SECTIONS[0], _Zero), *((name, dict[str, Any]) for name in SECTIONS[1:])], module=__name__
)


def deepspeed_config(config: RunConfig, topology: Topology, model: "DeepSeekV3Config | Model") -> dict[str, Any]:
    """Return `ds_configs/zeroN.json`, or the user's own file, with every "auto" filled in.

    Raises:
        ConfigError: if the user's file sets what smolds decides, or contradicts the run.
    """
    folders = (Path(__file__).parents[1] / "ds_configs", Path(__file__).parents[2] / "ds_configs")
    own = config.parallel.ds_config
    path = Path(own) if own else next(f for f in folders if f.is_dir()) / f"zero{topology.zero}.json"
    settings = read_json(path, "fix it", dict[str, Any])
    for key in SECTIONS:
        settings.setdefault(key, {})
    convert(settings, _Sections, path, "fix it")
    zero = settings["zero_optimization"]
    _reject_unsupported(path, settings)
    known = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": topology.micro_batch,
        "gradient_accumulation_steps": topology.accumulation,
        # Without ZeRO, DeepSpeed averages the ranks' norms if experts are sharded; DeepSpeedEngine clips instead.
        "gradient_clipping": config.train.grad_clip if topology.zero else 0.0,
        "bf16.enabled": topology.dtype == "bf16",
        "data_types.grad_accum_dtype": "fp32" if topology.zero or topology.dtype == "fp32" else "bf16",
        "zero_optimization.stage": topology.zero,
    }
    if not topology.zero:  # the sums over micro batches are fp32 (`DeepSpeedEngine`), also with "grad_accum_dtype" bf16
        settings.setdefault("communication_data_type", "fp32")
    autoep = autoep_section(topology.expert, model)
    choose_accelerator(topology)
    if asked := set(settings["expert_parallel"]) - set(autoep):
        autoep |= fixed_options(path, asked)
    known |= {f"expert_parallel.{key}": value for key, value in autoep.items()}
    zero.setdefault("stage", "auto")
    sizes = {
        "reduce_bucket_size": BUCKET[topology.device],
        "stage3_prefetch_bucket_size": PREFETCHED,
        "sub_group_size": SUB_GROUP,
    }
    zero |= {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    for name, value in known.items():
        section, _, key = name.rpartition(".")
        target = settings.setdefault(section, {}) if section else settings
        if target.get(key, "auto") == "auto":
            target[key] = value
        elif target[key] != value:
            raise ConfigError(
                f'{path} sets {name} to {target[key]!r}, but the run needs {value!r}; set it to "auto", or change the run.'
            )
    merged = {key: value for key, value in settings["expert_parallel"].items() if value != "auto"}
    tokens = max(topology.at(span).micro_batch * span.seq_len for span in resolve_stages(config).spans)
    merged = settings["expert_parallel"] = fast_paths(topology, model, tokens, merged)
    if asked:
        check_options(path, merged, topology)
    return settings


def _reject_unsupported(path: Path, settings: dict[str, Any]) -> None:
    """Raise a `ConfigError` if the user's file has sections or values that smolds cannot use; remove `fp16`."""
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ConfigError(f"{path} has the section {section!r}, which smolds builds from --train.*; remove it.")
    if settings.pop("fp16").get("enabled", "auto") not in (False, "auto"):
        raise ConfigError(
            f"{path} enables fp16, but smolds computes in fp32 or bf16; remove it, and set --train.dtype."
        )
    for section, devices in OFFLOADED.items():
        device = (settings["zero_optimization"].get(section) or {}).get("device", "none")
        if device not in devices:
            raise ConfigError(
                f"{path} sets {section} to {device}, where checkpoints cannot restore DeepSpeed's state; use "
                f"{' or '.join(devices)}."
            )


def autoep_section(expert: int, model: "DeepSeekV3Config | Model") -> dict[str, Any]:
    """Return the `expert_parallel` section with which AutoEP finds our `DeepSeekMoE` blocks and shards their experts."""
    section = {
        "enabled": True,
        "autoep_size": expert,
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_tok",
        "score_func": model.scoring_func,
        "route_norm": model.norm_topk_prob,
    }
    shared = {"has_shared_experts": True, "shared_experts_pattern": "shared_experts"} if model.n_shared_experts else {}
    return section | shared


class CommunicationClock:
    """Times collectives with DeepSpeed's communication log, which synchronizes the device around each one.

    DeepSpeed 0.19 logs the sum of all durations so far instead of each one's, so the log is dropped and its timer read.
    Remove when `deepspeed.comm.comm.timed_op` resets its timer; the log is then right.

    Args:
        operations: DeepSpeed's names. For asynchronous operations, only the launch is timed.
    """

    def __init__(self, *operations: str) -> None:
        from deepspeed.comm import comm

        self._comm, self._operations = comm, operations
        self._enabled, self._ops = comm.comms_logger.enabled, list(comm.comms_logger.prof_ops)  # the user's settings

    def run(self, on: bool) -> None:
        ops = [*self._ops, *self._operations] if on else self._ops
        self._comm.configure(enabled=on or self._enabled, prof_ops=ops)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each operation since the last call."""
        if not self._enabled:
            self._comm.reset_log()
        return {name: self._comm.timers(name).elapsed() / 1000 for name in self._operations}


def choose_accelerator(topology: Topology) -> None:
    """Keep DeepSpeed from using an installed GPU in a run on the CPU; call before DeepSpeed is imported."""
    if topology.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory op in `init_distributed`.

    The build takes a minute and a compiler, serves only inference, and a process that dies in it leaves a lock on which
    every later run waits indefinitely (DeepSpeed 0.19). Remove when DeepSpeed builds the op on first use.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def autoep_layers(model: nn.Module) -> dict[str, Any]:
    """Return AutoEP's layers by name (untyped: DeepSpeed has no annotations)."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return {name: module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}


def expert_parameters(model: nn.Module) -> dict[str, int]:
    """Return the names of this rank's expert weights, each with the index of its first expert."""
    return {
        f"{name}.experts.{weight}": layer.ep_rank * layer.num_local_experts
        for name, layer in autoep_layers(model).items()
        for weight in ("w1", "w2", "w3")
    }


def keep_routers_in_fp32(model: nn.Module) -> None:
    """Restore fp32 for selection biases and the router's matmul after the engine's cast to bf16.

    AutoEP computes the logits in the model's dtype (DeepSpeed 0.19). Remove when it offers fp32 logits.
    """

    def fp32_logits(gate: Any, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        return F.linear(args[0].float(), gate.weight.float())

    for layer in autoep_layers(model).values():
        layer.router.e_score_correction_bias = layer.router.e_score_correction_bias.float()
        # First among the hooks, because ZeRO 3's frees the gathered weight.
        layer.router.gate.register_forward_hook(fp32_logits, prepend=True)


def keep_router_logits(model: nn.Module) -> None:
    """Collect a pass's router logits [T, E] for `DeepSeekV3ForCausalLM` in `router_logits`, as our `DeepSeekMoE` does."""

    def keep(layer: Any, _gate: Any, _args: Any, logits_TE: Tensor) -> None:
        if layer.router_logits is not None:
            layer.router_logits.append(logits_TE)

    for layer in autoep_layers(model).values():
        layer.router_logits = None
        layer.router.gate.register_forward_hook(partial(keep, layer))
