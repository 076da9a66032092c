"""A checkpoint as one GGUF file for llama.cpp and programs based on it, such as Ollama and LM Studio.

Grouped-query attention with softmax scores becomes llama.cpp's architecture `ernie4_5-moe`; latent attention with a shared
expert becomes `deepseek2`. Tensors are written one by one, the experts of a layer stacked, so one tensor bounds memory.

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
from gguf import MODEL_ARCH as ARCH
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smolds_dist.checkpoint.files import CheckpointReader
from smolds_dist.errors import ConfigError
from smolds_dist.interchange.gguf_settings import hyperparameters, llama_architecture
from smolds_dist.interchange.gguf_tokenizer import Vocabulary, check_vocabulary, vocabulary, write_vocabulary
from smolds_dist.interchange.transformers_format import interleave_rotary, layer_of
from smolds_dist.model import DeepSeekV3Config

KINDS = {"fp32": Kind.F32, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
MODELFILE = """\
# ollama create {name} -f {modelfile}
# ollama run {name} "def add(first, second):"
FROM ./{file}
{template}PARAMETER temperature 0.6
PARAMETER top_k 50
"""
NO_CHAT = """\
# The model continues text; it does not follow instructions or hold conversations.
TEMPLATE "{{ .Prompt }}"
"""


class GGUFTensor(NamedTuple):
    """A tensor of the file; its rows are the last dimension, as in smolds."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]  # in fp32


def gguf_tensors(
    reader: CheckpointReader, biases: Mapping[str, Tensor], config: DeepSeekV3Config
) -> Iterator[GGUFTensor]:
    """Yield every tensor of the file; none is read yet."""
    N, D, R, E = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank, config.num_experts
    # llama.cpp rotates the same pairs as the transformers classes of these architectures.
    is_latent = config.attention == "latent"
    kind, architecture = ("deepseek_v3", ARCH.DEEPSEEK2) if is_latent else ("ernie4_5_moe", ARCH.ERNIE4_5_MOE)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def called(name: str) -> str:
        """Return the name in the file of a tensor of a transformers model."""
        found = names.get_name(name, (".weight", ".bias"))
        assert found
        return found

    def rotated(name: str) -> Tensor:
        return interleave_rotary(name, reader.read_full(name, "value"), config, kind)

    def stacked(name: str) -> Tensor:
        names = [name.replace(".experts.0.", f".experts.{number}.") for number in range(E)]
        return torch.stack([reader.read_full(one, "value") for one in names])

    def latent(name: str, keys: bool) -> Tensor:
        """Return the projection of a latent vector [R] to keys, of which D are not rotated, or to values."""
        heads = reader.read_full(name, "value").view(N, -1, R)
        return heads[:, :D].transpose(1, 2) if keys else heads[:, D:]

    layers = config.num_hidden_layers  # without those of multi-token prediction, which llama.cpp has for others only
    for name, shape in reader.manifest.tensors.items():
        if layer_of(name) >= layers:
            continue
        if expert := re.search(r"\.experts\.(\d+)\.", name):
            if expert[1] == "0":
                stack = name.replace(".experts.0.", ".experts.")
                yield GGUFTensor(called(stack), (E, *shape), partial(stacked, name))
        elif ".kv_b_proj." in name:
            for half, of_head in {"k_b_proj": (R, D), "v_b_proj": (shape[0] // N - D, R)}.items():
                load = partial(latent, name, keys=half == "k_b_proj")
                yield GGUFTensor(called(name.replace("kv_b_proj", half)), (N, *of_head), load)
        else:
            yield GGUFTensor(called(name), tuple(shape), partial(rotated, name))
    for name, bias in biases.items():
        if layer_of(name) < layers:
            yield GGUFTensor(called(name.replace("_bias", ".bias")), tuple(bias.shape), bias.float)


def quantization_of(tensor: GGUFTensor, plain: Kind, quantize: Kind | None) -> Kind:
    """Return a tensor's type. Norms, biases and routers always stay fp32; matrices whose rows are not a multiple of a block
    of 32 are not quantized."""
    if len(tensor.shape) == 1 or ".ffn_gate_inp." in tensor.name:
        return Kind.F32
    if quantize and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[quantize][0] == 0:
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
    """Write the file, and with `check` read it back and compare.

    Args:
        name: the model's name in the file.
        biases: selection biases [E] by name.
        dtype: fp32 or bf16.
        quantize: q8_0 or None.

    Raises:
        ConfigError: if llama.cpp has no equivalent architecture or tokenizer; then nothing is written.
    """
    architecture, values = llama_architecture(config), hyperparameters(config)
    vocab = vocabulary(tokenizer, config.vocab_size)
    plain, quantized = KINDS[dtype], KINDS[quantize] if quantize else None
    every = list(gguf_tensors(reader, biases, config))
    kinds = {tensor.name: quantization_of(tensor, plain, quantized) for tensor in every}

    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_name(name)
        most = quantized or plain
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if most == Kind.F32 else 'MOSTLY'}_{most.name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in values.items():
            writer.add_key_value(f"{architecture}.{key}", value, _TYPES[type(value)])
        write_vocabulary(vocab, tokenizer, config.eos_token_id, writer)
        for tensor in every:
            block, size = gguf.GGML_QUANT_SIZES[kinds[tensor.name]]
            nbytes = math.prod(tensor.shape) // block * size
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, kinds[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in every:
            writer.write_tensor_data(gguf.quantize(tensor.load().contiguous().numpy(), kinds[tensor.name]))
    finally:
        writer.close()
    if check:
        check_gguf(path, vocab, tokenizer, every, kinds)


def check_gguf(
    path: Path,
    vocab: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    expected: Iterable[GGUFTensor],
    kinds: Mapping[str, Kind],
) -> None:
    """Read a file back: its tokens must equal the tokenizer's, its values the checkpoint's up to rounding.

    Raises:
        RuntimeError: if they differ, which no input should cause.
    """
    file = gguf.GGUFReader(path)
    tokens, merges = (file.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    check_vocabulary(vocab._replace(tokens=tokens, merges=merges), tokenizer)
    found = {tensor.name: tensor for tensor in file.tensors}
    for one in expected:
        tensor, values, kind = found.pop(one.name), one.load(), kinds[one.name]
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(one.shape)
        if kind == Kind.BF16:
            values = values.bfloat16().float()
        difference, slack = (theirs - values).abs(), torch.zeros(())
        if kind == Kind.Q8_0:
            difference = difference.reshape(-1, 32)
            # Half a step (1/127 of a block's largest value), plus the rounding of the step to fp16.
            slack = values.reshape(-1, 32).abs().amax(-1, keepdim=True) * 0.005 + 1e-5
        if tensor.tensor_type != kind or not bool((difference <= slack).all()):
            raise RuntimeError(f"{one.name} differs between the file and the checkpoint")
    if found:
        raise RuntimeError(f"the file has {sorted(found)[0]}, which the checkpoint does not have")


def modelfile(path: Path, chat: bool) -> tuple[Path, str]:
    """Return the path, next to the model's file, and the text of Ollama's Modelfile. An existing file with other content is
    kept.

    Args:
        chat: True if the model's file has a chat template.

    Raises:
        ConfigError: if both possible names are taken.
    """
    paths = [path.with_name("Modelfile"), path.with_suffix(".Modelfile")]
    for candidate in paths:
        template = "" if chat else NO_CHAT
        text = MODELFILE.format(name=path.stem, file=path.name, modelfile=candidate.name, template=template)
        if not candidate.exists() or candidate.read_text(encoding="utf-8") == text:
            return candidate, text
    raise ConfigError(f"{paths[0]} and {paths[1]} exist already; move one of them, or choose another --to.")
