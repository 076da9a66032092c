"""Conversion to and from transformers' own classes: class, configuration and renamed weights.

| class | features of smolds |
|---|---|
| `Ernie4_5_MoeForCausalLM` | grouped-query attention, renormalized softmax scores; biases, shared experts, dense layers |
| `MixtralForCausalLM` | the same without biases, shared experts and dense layers |
| `Qwen3MoeForCausalLM`, `OlmoeForCausalLM` | `qk_norm` "head" and "all", softmax scores; no selection biases |
| `LlamaForCausalLM` | grouped-query attention and a single expert |
| `DeepseekV3ForCausalLM` | latent attention, sigmoid scores, a shared expert |

Shape letters: n heads, D rows of a head, P of them rotary, C columns.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from smolds_dist.model import DeepSeekV3Config
from smolds_dist.settings import Yarn

CLASSES = {
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# In DeepSeek-V3's files, copies of the embedding and the head in each layer of multi-token prediction
SHARED_COPIES = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
UNBIASED = ("mixtral", "qwen3_moe", "olmoe")  # without selection biases
LATENT_NORM_EPS = 1e-6  # fixed in DeepSeek-V3's class
_SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_GQA = _same("num_key_value_heads head_dim num_experts_per_tok")
_DENSE_FIRST = ("ernie4_5_moe", "qwen3_moe", "deepseek_v3")  # first layers may be dense, of `intermediate_size`
# For each model type, its names of our fields.
_FIELDS: dict[str, dict[str, str]] = {
    "ernie4_5_moe": _GQA
    | {
        "intermediate_size": "moe_intermediate_size",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_k",
        "n_shared_experts": "moe_num_shared_experts",
        "first_k_dense_replace": "moe_layer_start_index",
    },
    "mixtral": _GQA | _same("intermediate_size") | {"num_experts": "num_local_experts"},
    "qwen3_moe": _GQA | _same("num_experts norm_topk_prob") | {"intermediate_size": "moe_intermediate_size"},
    "olmoe": _same("num_key_value_heads num_experts_per_tok intermediate_size num_experts norm_topk_prob"),
    "llama": _same("num_key_value_heads head_dim intermediate_size"),
    "deepseek_v3": {"intermediate_size": "moe_intermediate_size", "num_experts": "n_routed_experts"}
    | _same(
        "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim num_experts_per_tok n_shared_experts "
        "n_group topk_group norm_topk_prob routed_scaling_factor first_k_dense_replace"
    ),
}
_SOFTMAX = {"scoring_func": "softmax", "routed_scaling_factor": 1.0, "n_group": None, "attention": "gqa"}
_EXPERTS_ALONE = {"n_shared_experts": 0, "first_k_dense_replace": 0}
# Fixed values of our fields for each model type.
_FIXED: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": _SOFTMAX | {"norm_topk_prob": True, "qk_norm": None},
    "mixtral": _SOFTMAX | {"norm_topk_prob": True, "qk_norm": None} | _EXPERTS_ALONE,
    "qwen3_moe": _SOFTMAX | {"qk_norm": "head", "n_shared_experts": 0},
    "olmoe": _SOFTMAX | {"qk_norm": "all"} | _EXPERTS_ALONE,
    "llama": _SOFTMAX | {"num_experts": 1, "num_experts_per_tok": 1, "qk_norm": None} | _EXPERTS_ALONE,
    "deepseek_v3": {"attention": "latent", "scoring_func": "sigmoid"},
}
# Fields of their configurations that do not change what a model computes, or are compared elsewhere.
_NO_MATTER = (
    "dtype torch_dtype architectures transformers_version use_cache _name_or_path pretraining_tp output_router_logits "
    "router_aux_loss_coef rope_parameters rope_scaling rope_theta rope_interleave num_mtp_layers num_nextn_predict_layers "
    "ep_size aux_loss_alpha seq_aux auto_map max_window_layers"
).split()


def model_type(config: DeepSeekV3Config, biased: bool = True) -> str:
    """Return transformers' model type that computes the same function, if there is one.

    Args:
        biased: True if any selection bias is not 0.
    """
    if config.attention == "latent":
        return "deepseek_v3"
    if config.num_experts == 1 and not config.n_shared_experts and not config.first_k_dense_replace:
        return "llama"
    if config.qk_norm:
        return "qwen3_moe" if config.qk_norm == "head" else "olmoe"
    return "ernie4_5_moe" if biased or config.n_shared_experts or config.first_k_dense_replace else "mixtral"


def transformers_config(config: DeepSeekV3Config, biased: bool = True, kind: str | None = None) -> PreTrainedConfig:
    """Return the configuration of the transformers model that computes the same function.

    Args:
        biased: True if any selection bias is not 0.
        kind: their model type; default: `model_type`.

    Raises:
        ValueError: if there is none; names the setting without counterpart.
    """
    kind = kind or model_type(config, biased)
    common = {name: getattr(config, name) for name in _SHARED_FIELDS}
    scaling = {name: value for name, value in (config.rope_scaling or {}).items() if value is not None}
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    theirs = _counterpart(config, kind, common)
    if biased and kind in UNBIASED:
        raise ValueError(f"{CLASSES[kind]} has no selection biases; train with --train.balance none or aux_loss.")
    # transformers 4, mlx-lm and others read it only here, and otherwise use their own default.
    theirs.rope_theta = config.rope_theta
    return theirs


def save_config(written: PreTrainedConfig, folder: Path) -> None:
    """Save like `save_pretrained`; for transformers' own classes also under names that other readers expect but
    transformers 5 has dropped: YaRN's settings, and the number of Qwen3's experts."""
    written.save_pretrained(folder)
    if written.model_type not in CLASSES:
        return
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if (rope := written.rope_parameters)["rope_type"] == "yarn":
        saved["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"} | {"type": "yarn"}
    if written.model_type == "qwen3_moe":
        saved["num_experts"] = written.num_experts
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _counterpart(config: DeepSeekV3Config, kind: str, common: dict[str, Any]) -> PreTrainedConfig:
    fixed = _FIXED[kind]
    if config.scoring_func != fixed["scoring_func"] and kind in ("ernie4_5_moe", "deepseek_v3"):
        raise ValueError(
            f"no transformers model has attention={fixed['attention']!r} with scoring_func={config.scoring_func!r}; gqa "
            "needs softmax, latent needs sigmoid."
        )
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{CLASSES[kind]} has no counterpart for {name}={getattr(config, name)!r}, only {value!r}."
            )
    theirs = common | {name: getattr(config, ours) for ours, name in _FIELDS[kind].items()}
    if kind in _DENSE_FIRST:
        theirs["intermediate_size"] = config.dense_intermediate_size or config.intermediate_size
    if kind == "qwen3_moe":
        theirs["mlp_only_layers"] = list(range(config.first_k_dense_replace))
    if kind == "olmoe" and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"{CLASSES['olmoe']} has no head_dim field; head_dim must be hidden_size / num_attention_heads."
        )
    if kind == "deepseek_v3":
        if not config.n_shared_experts:
            raise ValueError(
                "transformers' DeepSeek-V3 always has a shared expert; n_shared_experts=0 has no counterpart."
            )
        if (config.rms_norm_eps if config.latent_norm_eps is None else config.latent_norm_eps) != LATENT_NORM_EPS:
            raise ValueError(
                "transformers' DeepSeek-V3 fixes the epsilon of the latent norms; only latent_norm_eps=1e-6 matches."
            )
        theirs |= {"num_key_value_heads": config.num_attention_heads, "rope_interleave": True}
        theirs["num_mtp_layers"] = config.num_nextn_predict_layers
        theirs |= {"n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
        # transformers assumes these; other readers expect them.
        theirs |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    return CONFIG_MAPPING[kind](**theirs)


def to_transformers(name: str, tensor: Tensor, config: DeepSeekV3Config, kind: str) -> tuple[str, Tensor] | None:
    """Return a logical tensor or selection bias of ours (`parallel.fragments`) with its name and row order in transformers'
    files, which also store every matrix of every expert separately. None if there is no such tensor."""
    if kind != "deepseek_v3" and layer_of(name) >= config.num_hidden_layers:
        return None
    tensor = interleave_rotary(name, tensor, config, kind)
    if name.endswith(".gate.e_score_correction_bias"):
        if kind == "ernie4_5_moe":
            return name.replace(".gate.", ".moe_statics."), tensor[None]
        return (name, tensor) if kind == "deepseek_v3" else None
    if kind == "llama":
        return None if ".mlp.gate." in name else (name.replace(".experts.0.", "."), tensor)
    if kind == "mixtral" and ".mlp." in name:
        for ours, theirs in _MIXTRAL.items():
            name = name.replace(f".{ours}.weight", f".{theirs}.weight")
        return name.replace(".mlp.", ".block_sparse_moe."), tensor
    return name, tensor


_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def from_transformers(name: str, tensor: Tensor, config: DeepSeekV3Config, theirs: Any) -> tuple[str, Tensor] | None:
    """Invert `to_transformers` for a model with the configuration `theirs`; stacked experts stay stacked. None for a tensor
    that does not change what the model computes."""
    kind, layer = theirs.model_type, layer_of(name)
    copies = tuple(f".{copy}.weight" for copy in SHARED_COPIES) if layer >= config.num_hidden_layers else ()
    beyond = layer >= config.num_hidden_layers + config.num_nextn_predict_layers
    if name.endswith(("rotary_emb.inv_freq", *copies)) or beyond:
        return None
    pairs = kind == "ernie4_5_moe" or getattr(theirs, "rope_interleave", False)
    if pairs and (rotary := _rotary_rows(name, config, kind)):
        return name, _reordered(tensor, *rotary, (rotary[1] // 2, 2))
    if name.endswith(".moe_statics.e_score_correction_bias"):
        return re.sub(r"\.(gate\.)?moe_statics\.", ".gate.", name), tensor[0]
    if kind == "llama":
        return re.sub(r"\.mlp\.(\w+_proj)\.", r".mlp.experts.0.\1.", name), tensor
    if kind == "mixtral":
        name = name.replace(".block_sparse_moe.", ".mlp.")
        for ours, called in _MIXTRAL.items():
            name = name.replace(f".{called}.weight", f".{ours}.weight")
    return name, tensor


def layer_of(name: str) -> int:
    """Return a tensor's layer; -1 outside layers."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else -1


def _rotary_rows(name: str, config: DeepSeekV3Config, kind: str) -> tuple[int, int] | None:
    """Return the rows of a head and how many (its last) are rotary, if their order differs from ours.

    Ours rotates the pairs (i, i + P/2), ERNIE and DeepSeek-V3 the pairs (2 i, 2 i + 1), all others the same as ours.
    """
    weight = name.rpartition(".self_attn.")[2]
    if kind == "ernie4_5_moe" and weight in ("q_proj.weight", "k_proj.weight"):
        return config.head_dim, config.head_dim
    if kind == "deepseek_v3" and weight in ("q_proj.weight", "q_b_proj.weight"):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.qk_rope_head_dim
    if kind == "deepseek_v3" and weight == "kv_a_proj_with_mqa.weight":
        return config.kv_lora_rank + config.qk_rope_head_dim, config.qk_rope_head_dim
    return None


def interleave_rotary(name: str, tensor: Tensor, config: DeepSeekV3Config, kind: str) -> Tensor:
    """Return a logical tensor of ours in the row order of a model type that rotates the pairs (2 i, 2 i + 1)."""
    if rotary := _rotary_rows(name, config, kind):
        return _reordered(tensor, *rotary, (2, rotary[1] // 2))
    return tensor


def _reordered(tensor: Tensor, head: int, rotary: int, order: tuple[int, int]) -> Tensor:
    rows_nDC = tensor.view(-1, head, tensor.shape[-1])
    plain, rotary_rows = rows_nDC.split([head - rotary, rotary], dim=1)
    rotary_rows = rotary_rows.reshape(len(rotary_rows), *order, -1).transpose(1, 2).reshape(rotary_rows.shape)
    return torch.cat((plain, rotary_rows), dim=1).reshape(tensor.shape)


def our_config(theirs: Any) -> DeepSeekV3Config:
    """Return our configuration of the same function as a model of `CLASSES`.

    Raises:
        ValueError: if there is none; names the setting without counterpart.
    """
    kind = theirs.model_type
    if kind not in CLASSES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(CLASSES)}.")
    if getattr(theirs, "quantization_config", None):
        raise ValueError("quantized weights (quantization_config) cannot be read; convert them to bf16 first.")
    fields = {name: getattr(theirs, name) for name in _SHARED_FIELDS} | _rope(theirs) | _parts(theirs)
    try:
        ours = DeepSeekV3Config(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    # Fields without counterpart must have the values that converting back would give.
    expected = transformers_config(ours, biased=False, kind=kind).to_dict()
    for name, value in theirs.to_dict().items():
        if name == "intermediate_size" and kind in _DENSE_FIRST:
            continue  # of dense layers, if any
        if name == "head_dim" and value is None:
            continue  # hidden_size / num_attention_heads
        if name in expected and name not in _NO_MATTER and expected[name] != value:
            raise ValueError(f"{name}={value!r} is not supported; only {expected[name]!r} is.")
    return ours


def _rope(theirs: Any) -> dict[str, Any]:
    rope = dict(theirs.rope_parameters or {})
    kind, theta = rope.pop("rope_type", "default"), float(rope.pop("rope_theta"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={theirs.rope_parameters['partial_rotary_factor']} is not supported.")
    if kind == "default":
        return {"rope_theta": theta}
    unknown = [name for name in rope if name not in Yarn.__dataclass_fields__]
    if kind != "yarn" or unknown:
        message = f"its setting {unknown[0]!r}" if kind == "yarn" else f"rope_type {kind!r}"
        raise ValueError(f"{message} is not supported; only plain rotary embedding and YaRN are.")
    if rope.get("factor") is None:
        rope["factor"] = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "yarn", **rope}}


def _parts(theirs: Any) -> dict[str, Any]:
    """Return the fields of attention, mixture of experts and dense layers."""
    kind = theirs.model_type
    ours = {name: getattr(theirs, called, None) for name, called in _FIELDS[kind].items()} | _FIXED[kind]
    if kind == "deepseek_v3":
        ours["latent_norm_eps"] = LATENT_NORM_EPS
        if (ours["n_group"] or 1) == 1:
            ours["n_group"] = ours["topk_group"] = None
    else:
        heads = theirs.num_attention_heads
        ours["num_key_value_heads"] = theirs.num_key_value_heads or heads
        ours["head_dim"] = ours.get("head_dim") or theirs.hidden_size // heads
    if kind == "qwen3_moe":
        ours["first_k_dense_replace"] = len(theirs.mlp_only_layers or [])
    if ours["first_k_dense_replace"]:
        ours["dense_intermediate_size"] = theirs.intermediate_size
    return ours
