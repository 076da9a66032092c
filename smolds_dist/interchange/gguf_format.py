"""A checkpoint as one GGUF file, which llama.cpp runs, and all that stands on it, such as Ollama and LM Studio.

Grouped-query attention with softmax scores is llama.cpp's architecture `ernie4_5-moe`, latent attention with a shared expert
its `deepseek2`. Tensors are written one after the other, the experts of a layer stacked, so it takes memory for one of them.

Shape letters: V vocabulary, H hidden, E experts, I expert width, N query heads, D head dimension,
R latent rank.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smolds_dist.checkpoint.files import CheckpointReader
from smolds_dist.errors import ConfigError
from smolds_dist.interchange.gguf_settings import hyperparameters, llama_architecture
from smolds_dist.interchange.gguf_tokenizer import Vocabulary, check_vocabulary, vocabulary, write_vocabulary
from smolds_dist.interchange.transformers_format import interleave_rotary
from smolds_dist.model import DeepSeekV3Config

KINDS = {"fp32": Kind.F32, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
# Modules of a layer and of the whole model, as the file calls them.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
MODELFILE = """\
# ollama create {name} -f {modelfile}
# ollama run {name} "def add(first, second):"
FROM ./{file}
{template}PARAMETER temperature 0.6
PARAMETER top_k 50
"""
NO_CHAT = """\
# The model goes on from a text; it follows no instructions and holds no conversation.
TEMPLATE "{{ .Prompt }}"
"""


class GGUFTensor(NamedTuple):
    """A tensor of the file; its rows are the last dimension, as in ours."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]  # in fp32


def entries(reader: CheckpointReader, biases: Mapping[str, Tensor], config: DeepSeekV3Config) -> Iterator[GGUFTensor]:
    """Every tensor of the file, none of them read yet."""
    N, D, R, E = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank, config.num_experts
    # llama.cpp turns the same pairs as the classes that it has its architectures from.
    kind = "deepseek_v3" if config.attention == "latent" else "ernie4_5_moe"

    def permuted(name: str) -> Tensor:
        return interleave_rotary(name, reader.read_full(name, "value"), config, kind)

    def stacked(name: str) -> Tensor:
        names = [name.replace(".experts.0.", f".experts.{number}.") for number in range(E)]
        return torch.stack([reader.read_full(one, "value") for one in names])

    def latent(name: str, keys: bool) -> Tensor:
        """What makes keys, of which D are not turned, or values of a latent vector [R]."""
        heads = reader.read_full(name, "value").view(N, -1, R)
        return heads[:, :D].transpose(1, 2) if keys else heads[:, D:]

    for name, shape in reader.manifest.tensors.items():
        block, module = _block_and_module(name)
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", module)
        if expert and expert[1] != "0":
            continue
        if expert:
            yield GGUFTensor(f"{block}{_EXPERTS[expert[2]]}.weight", (E, *shape), partial(stacked, name))
        elif module == "self_attn.kv_b_proj":
            yield GGUFTensor(f"{block}attn_k_b.weight", (N, R, D), partial(latent, name, keys=True))
            yield GGUFTensor(f"{block}attn_v_b.weight", (N, shape[0] // N - D, R), partial(latent, name, keys=False))
        else:
            yield GGUFTensor(f"{block}{_NAMES[module]}.weight", tuple(shape), partial(permuted, name))
    for name, bias in biases.items():
        yield GGUFTensor(f"{_block_and_module(name)[0]}exp_probs_b.bias", tuple(bias.shape), bias.float)


def _block_and_module(name: str) -> tuple[str, str]:
    """Of a logical tensor's name: the file's prefix for its layer, and the module within the layer."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*?)\.(?:weight|e_score_correction_bias)", name)
    assert match
    return (f"blk.{match[1]}." if match[1] else ""), match[2]


def quantization_of(part: GGUFTensor, plain: Kind, quantize: Kind | None) -> Kind:
    """What a tensor's numbers are. Norms, biases and routers stay fp32, whatever is asked for; matrices whose rows are no
    multiple of a block of 32 are not quantised, and stay what they would be without."""
    if len(part.shape) == 1 or ".ffn_gate_inp." in part.name:
        return Kind.F32
    if quantize and part.shape[-1] % gguf.GGML_QUANT_SIZES[quantize][0] == 0:
        return quantize
    return plain


def write_gguf(
    path: Path,
    name: str,
    reader: CheckpointReader,
    biases: Mapping[str, Tensor],
    config: DeepSeekV3Config,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    quantize: str | None,
    check: bool,
) -> None:
    """Writes the file, and reads it back where `check` says so.

    Args:
        name: what the model is to be called.
        biases: selection biases [E] by name.
        dtype: fp32 or bf16.
        quantise: q8_0, or nothing.

    Raises:
        ConfigError: where llama.cpp has no architecture, or no tokenizer, that does the same; nothing is written then.
    """
    architecture, values = llama_architecture(config), hyperparameters(config)
    words = vocabulary(tokenizer, config.vocab_size)
    plain, quantized = KINDS[dtype], KINDS[quantize] if quantize else None
    every = list(entries(reader, biases, config))
    kinds = {part.name: quantization_of(part, plain, quantized) for part in every}

    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_name(name)
        most = quantized or plain
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if most == Kind.F32 else 'MOSTLY'}_{most.name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in values.items():
            writer.add_key_value(f"{architecture}.{key}", value, _TYPES[type(value)])
        write_vocabulary(words, tokenizer, config.eos_token_id, writer)
        for part in every:
            block, size = gguf.GGML_QUANT_SIZES[kinds[part.name]]
            nbytes = math.prod(part.shape) // block * size
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), nbytes, kinds[part.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in every:
            writer.write_tensor_data(gguf.quantize(part.load().contiguous().numpy(), kinds[part.name]))
    finally:
        writer.close()
    if check:
        check_gguf(path, words, tokenizer, every, kinds)


def check_gguf(
    path: Path,
    words: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    expected: Iterable[GGUFTensor],
    kinds: Mapping[str, Kind],
) -> None:
    """Reads a file back: its tokens must be the tokenizer's, its numbers the checkpoint's, but for rounding.

    Raises:
        RuntimeError: where they are not, which no input should bring about.
    """
    file = gguf.GGUFReader(path)
    tokens, merges = (file.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    check_vocabulary(words._replace(tokens=tokens, merges=merges), tokenizer)
    found = {tensor.name: tensor for tensor in file.tensors}
    for part in expected:
        tensor, values, kind = found.pop(part.name), part.load(), kinds[part.name]
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(part.shape)
        if kind == Kind.BF16:
            values = values.bfloat16().float()
        difference, slack = (theirs - values).abs(), torch.zeros(())
        if kind == Kind.Q8_0:
            difference = difference.reshape(-1, 32)
            # Half a step, which is 1/127 of a block's largest number, and what rounding the step to fp16 adds.
            slack = values.reshape(-1, 32).abs().amax(-1, keepdim=True) * 0.005 + 1e-5
        if tensor.tensor_type != kind or not bool((difference <= slack).all()):
            raise RuntimeError(f"{part.name} is not in the file as it is in the checkpoint")
    if found:
        raise RuntimeError(f"the file holds {sorted(found)[0]}, which the checkpoint does not")


def modelfile(path: Path, chat: bool) -> tuple[Path, str]:
    """Ollama's description of a model: where it goes beside the model's file, and its text. What is there already, and says
    something else, stays as it is.

    Args:
        chat: whether the model's file holds a chat template.

    Raises:
        ConfigError: where both names that it could have are taken.
    """
    paths = [path.with_name("Modelfile"), path.with_suffix(".Modelfile")]
    for place in paths:
        template = "" if chat else NO_CHAT
        text = MODELFILE.format(name=path.stem, file=path.name, modelfile=place.name, template=template)
        if not place.exists() or place.read_text(encoding="utf-8") == text:
            return place, text
    raise ConfigError(f"{paths[0]} and {paths[1]} are there already; move one away, or choose another --to.")
