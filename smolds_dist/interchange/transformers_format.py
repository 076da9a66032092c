"""The same model in transformers' own classes: which class and configuration, and the weights renamed; there and back.

| class | what it is of ours |
|---|---|
| `Ernie4_5_MoeForCausalLM` | grouped-query attention, renormalised softmax scores; biases, shared experts, dense layers |
| `MixtralForCausalLM` | the same without these three |
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

CLASSES = {
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
UNBIASED = ("mixtral", "qwen3_moe", "olmoe")  # which know no selection biases
LATENT_NORM_EPS = 1e-6  # which DeepSeek-V3's class does not let one choose
_SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()
_YARN_FIELDS = (
    "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim attention_factor truncate"
).split()


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_GQA = _same("num_key_value_heads head_dim num_experts_per_tok")
_DENSE_FIRST = ("ernie4_5_moe", "qwen3_moe", "deepseek_v3")  # whose first layers may be; they have `intermediate_size`
# Of each kind of model, its names of our fields.
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
# What each kind takes for granted.
_FIXED: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": _SOFTMAX | {"norm_topk_prob": True, "qk_norm": None},
    "mixtral": _SOFTMAX | {"norm_topk_prob": True, "qk_norm": None} | _EXPERTS_ALONE,
    "qwen3_moe": _SOFTMAX | {"qk_norm": "head", "n_shared_experts": 0},
    "olmoe": _SOFTMAX | {"qk_norm": "all"} | _EXPERTS_ALONE,
    "llama": _SOFTMAX | {"num_experts": 1, "num_experts_per_tok": 1, "qk_norm": None} | _EXPERTS_ALONE,
    "deepseek_v3": {"attention": "latent", "scoring_func": "sigmoid"},
}
# Of their configurations what changes nothing in what a model computes, or is compared in another way.
_NO_MATTER = (
    "dtype torch_dtype architectures transformers_version use_cache _name_or_path pretraining_tp output_router_logits "
    "router_aux_loss_coef rope_parameters rope_scaling rope_theta rope_interleave num_mtp_layers num_nextn_predict_layers "
    "ep_size aux_loss_alpha seq_aux auto_map max_window_layers"
).split()


def model_type(config: DeepSeekV3Config, biased: bool = True) -> str:
    """transformers' name of the kind of model that computes the same function, if any does.

    Args:
        biased: whether any selection bias is not 0.
    """
    if config.attention == "latent":
        return "deepseek_v3"
    if config.num_experts == 1 and not config.n_shared_experts and not config.first_k_dense_replace:
        return "llama"
    if config.qk_norm:
        return "qwen3_moe" if config.qk_norm == "head" else "olmoe"
    return "ernie4_5_moe" if biased or config.n_shared_experts or config.first_k_dense_replace else "mixtral"


def transformers_config(config: DeepSeekV3Config, biased: bool = True, kind: str | None = None) -> PreTrainedConfig:
    """The configuration of the transformers model that computes the same function.

    Args:
        biased: whether any selection bias is not 0.
        kind: a model type of theirs, where it is not to be `model_type`'s.

    Raises:
        ValueError: where there is none, naming the setting that stands in the way.
    """
    kind = kind or model_type(config, biased)
    common = {name: getattr(config, name) for name in _SHARED_FIELDS}
    scaling = {name: value for name, value in (config.rope_scaling or {}).items() if value is not None}
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    theirs = _counterpart(config, kind, common)
    if biased and kind in UNBIASED:
        raise ValueError(
            f"{CLASSES[kind]} has no selection biases; train with balance none or aux_loss to keep them 0."
        )
    # transformers 4, mlx-lm and others look for these here alone, and else take a default of their own.
    theirs.rope_theta = config.rope_theta
    return theirs


def save_config(written: PreTrainedConfig, folder: Path) -> None:
    """As `save_pretrained`; of transformers' own classes also under the names that other readers know and transformers 5
    has given up: YaRN's settings, and the number of Qwen3's experts."""
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
            f"{CLASSES['olmoe']} has no head_dim of its own; it must be hidden_size / num_attention_heads."
        )
    if kind == "deepseek_v3":
        if not config.n_shared_experts:
            raise ValueError(
                "transformers' DeepSeek-V3 always has a shared expert; n_shared_experts=0 has no counterpart."
            )
        if (config.rms_norm_eps if config.latent_norm_eps is None else config.latent_norm_eps) != LATENT_NORM_EPS:
            raise ValueError(
                "transformers' DeepSeek-V3 fixes the latent norms' epsilon; only latent_norm_eps=1e-6 matches."
            )
        theirs |= {"num_key_value_heads": config.num_attention_heads, "rope_interleave": True, "num_mtp_layers": 0}
        theirs |= {"n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
        # transformers takes these for granted; others read them.
        theirs |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    return CONFIG_MAPPING[kind](**theirs)


def to_transformers(name: str, tensor: Tensor, config: DeepSeekV3Config, kind: str) -> tuple[str, Tensor] | None:
    """A logical tensor or selection bias of ours (`parallel.fragments`) under the name and in the row order of transformers'
    files, in which too every matrix of every expert stands on its own. None: there is no such tensor there."""
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
    """The way back of `to_transformers`, from a model with the configuration `theirs`; stacked experts stay stacked. None: a
    tensor that changes nothing in what the model computes."""
    kind = theirs.model_type
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if name.endswith("rotary_emb.inv_freq") or (layer and int(layer[1]) >= config.num_hidden_layers):
        return None  # computed anew; layers after the last predict further tokens (DeepSeek-V3, section 2.2)
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


def _rotary_rows(name: str, config: DeepSeekV3Config, kind: str) -> tuple[int, int] | None:
    """Rows of a head and how many of them, its last, are turned, where their order is not that of ours.

    We turn the pairs (i, i + P/2), ERNIE and DeepSeek-V3 the pairs (2 i, 2 i + 1); the others do as we do.
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
    """A logical tensor of ours in the row order of a kind of model that turns the pairs (2 i, 2 i + 1)."""
    if rotary := _rotary_rows(name, config, kind):
        return _reordered(tensor, *rotary, (2, rotary[1] // 2))
    return tensor


def _reordered(tensor: Tensor, head: int, rotary: int, order: tuple[int, int]) -> Tensor:
    rows_nDC = tensor.view(-1, head, tensor.shape[-1])
    still, turned = rows_nDC.split([head - rotary, rotary], dim=1)
    turned = turned.reshape(len(turned), *order, -1).transpose(1, 2).reshape(turned.shape)
    return torch.cat((still, turned), dim=1).reshape(tensor.shape)


def our_config(theirs: Any) -> DeepSeekV3Config:
    """Our configuration of the same function as one of `CLASSES`' models.

    Raises:
        ValueError: where there is none, naming the setting that stands in the way.
    """
    kind = theirs.model_type
    if kind not in CLASSES:
        raise ValueError(f"model_type {kind!r} is none of {', '.join(CLASSES)}.")
    if getattr(theirs, "quantization_config", None):
        raise ValueError(
            "quantization_config is there, but only plain weights can be read; convert them to bf16 first."
        )
    fields = {name: getattr(theirs, name) for name in _SHARED_FIELDS} | _rope(theirs) | _parts(theirs)
    try:
        ours = DeepSeekV3Config(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    # What our configuration cannot say must be as our way back would say it.
    expected = transformers_config(ours, biased=False, kind=kind).to_dict()
    for name, value in theirs.to_dict().items():
        if name == "intermediate_size" and kind in _DENSE_FIRST:
            continue  # of dense layers, which there may be none of
        if name == "head_dim" and value is None:
            continue  # hidden_size / num_attention_heads
        if name in expected and name not in _NO_MATTER and expected[name] != value:
            raise ValueError(f"{name}={value!r} has no counterpart; only {expected[name]!r} has.")
    return ours


def _rope(theirs: Any) -> dict[str, Any]:
    rope = dict(theirs.rope_parameters or {})
    kind, theta = rope.pop("rope_type", "default"), float(rope.pop("rope_theta"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={theirs.rope_parameters['partial_rotary_factor']} has no counterpart.")
    if kind == "default":
        return {"rope_theta": theta}
    unknown = [name for name in rope if name not in _YARN_FIELDS]
    if kind != "yarn" or unknown:
        message = f"its setting {unknown[0]!r}" if kind == "yarn" else f"rope_type {kind!r}"
        raise ValueError(f"{message} has no counterpart; only plain rotary embedding and YaRN have.")
    if rope.get("factor") is None:
        rope["factor"] = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "yarn", **rope}}


def _parts(theirs: Any) -> dict[str, Any]:
    """Attention, mixture of experts and dense layers."""
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
