"""The model of a job as a folder in Hugging Face format, written by all ranks: nothing is whole anywhere.

Every file has one rank that writes it, tensor by tensor as the others send their parts. What is written does not depend on
the ranks: one process writes the same files.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedWriter
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from smolds_dist.checkpoint.files import batch_by_bytes
from smolds_dist.data.tokenizer import save_tokenizer
from smolds_dist.files import replaced
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.fragments import logical_shapes, tensor_shapes
from smolds_dist.parallel.gather import Gatherer
from smolds_dist.parallel.topology import Topology

FILE_BYTES = 2_000_000_000
ROUND_BYTES = 2**26  # of one file's tensors, that travel at a time
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def export_model(
    folder: Path,
    engine: Engine,
    balancer: Balancer,
    topology: Topology,
    model_config: DeepSeekV3Config,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes weights, in the dtype that the run computes in, configuration and tokenizer. Collective."""
    with torch.device("meta"):
        skeleton = DeepSeekV3ForCausalLM(model_config)
    dtype = torch.bfloat16 if topology.dtype == "bf16" else torch.float32
    for parameter in skeleton.parameters():
        parameter.data = parameter.data.to(dtype)
    write_weights(folder, skeleton, engine, balancer, topology)
    if topology.rank == 0:
        skeleton.config.architectures, skeleton.config.dtype = [type(skeleton).__name__], dtype
        skeleton.config.save_pretrained(folder)
        skeleton.generation_config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)


def write_weights(
    folder: Path,
    skeleton: nn.Module,
    engine: Engine,
    balancer: Balancer,
    topology: Topology,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes safetensors files as transformers names them, and where there are several their index. Collective.

    Args:
        skeleton: the model without storage, in the dtype that is wanted.
        file_bytes: a file has as many tensors as fit into this; a larger one alone.
    """
    biases = balancer.named_biases()
    parameters = dict(skeleton.named_parameters())  # a tied weight once
    stored = {name: bias.to("meta") for name, bias in biases.items()} | parameters
    tensors = {name: stored[name] for name in skeleton.state_dict() if name in stored}
    # Each sorted as safetensors does it, so that its own files are the same.
    files = [
        dict(sorted(some.items(), key=lambda item: (-item[1].itemsize, item[0])))
        for some in batch_by_bytes(tensors.items(), file_bytes)
    ]
    names = file_names(len(files))
    if topology.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    engine.barrier()
    dtype = next(iter(parameters.values())).dtype
    gatherer = Gatherer(engine.fragments(), tensor_shapes(skeleton), engine.device, dtype)
    for first in range(0, len(files), topology.world_size):
        together = files[first : first + topology.world_size]
        with ExitStack() as opened:
            if topology.rank < len(together):
                path = folder / names[first + topology.rank]
                out = opened.enter_context(new_safetensors(path, together[topology.rank]))
            for wanted in in_rounds(together, topology.world_size):
                found = iter(gatherer([[name for name in some if name not in biases] for some in wanted]))
                for name in wanted[topology.rank]:
                    tensor = biases[name].cpu() if name in biases else next(found)
                    out.write(tensor.view(torch.uint8).numpy().data)
    engine.barrier()
    if topology.rank == 0:
        for old in folder.glob("model*.safetensors*"):
            if old.name not in names:
                old.unlink()
        write_index(folder, [{name: tensor.nbytes for name, tensor in some.items()} for some in files])


def file_names(count: int) -> list[str]:
    """Of a model's files, as transformers names them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, sizes: list[dict[str, int]]) -> None:
    """Of several files, which has which tensors; `sizes` are the bytes of each file's tensors by name."""
    if len(sizes) > 1:
        total = sum(sum(some.values()) for some in sizes)
        places = {name: file for some, file in zip(sizes, file_names(len(sizes)), strict=True) for name in some}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def new_safetensors(path: Path, tensors: dict[str, Tensor]) -> Iterator[BufferedWriter]:
    """A safetensors file whose values are to be written, in this order; it has its name once it is whole.

    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        offsets = [begin, begin + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replaced(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        yield file


def in_rounds(files: list[dict[str, Tensor]], world: int) -> Iterator[list[list[str]]]:
    """For each rank the logical tensors of its file in order, so many of every file at a time as `ROUND_BYTES` hold."""

    def parts(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            for part, shape in logical_shapes(name, tensor.shape).items():
                yield part, tensor.new_empty(shape)

    batches = (batch_by_bytes(parts(tensors), ROUND_BYTES) for tensors in files)
    for wanted in zip_longest(*batches, fillvalue={}):
        yield [list(names) for names in wanted] + [[]] * (world - len(files))  # fewer files than ranks
