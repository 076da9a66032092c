"""Export of the model in Hugging Face format at the end of training, written by all ranks: no rank holds the full model.

Each file is written by one rank, tensor by tensor, while the other ranks send their slices. The files do not depend on the
number of ranks.
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

from smolds_dist.activity import beat
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
ROUND_BYTES = 2**26  # of one file's tensors, sent per round
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def export_model(
    folder: Path,
    engine: Engine,
    balancer: Balancer,
    topology: Topology,
    model_config: DeepSeekV3Config,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write weights, in the run's dtype, configuration and tokenizer. Collective."""
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
    """Write safetensors files named as in transformers, and an index if there are several. Collective.

    Args:
        skeleton: model without storage, in the dtype to write.
        file_bytes: maximum size of a file, except for a single larger tensor.
    """
    biases = balancer.named_biases()
    parameters = dict(skeleton.named_parameters())  # tied weights once
    stored = {name: bias.to("meta") for name, bias in biases.items()} | parameters
    tensors = {name: stored[name] for name in skeleton.state_dict() if name in stored}
    # Sorted like safetensors' own files, so that they are identical.
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
                    beat()
    engine.barrier()
    if topology.rank == 0:
        for old in folder.glob("model*.safetensors*"):
            if old.name not in names:
                old.unlink()
        write_index(folder, [{name: tensor.nbytes for name, tensor in some.items()} for some in files])


def file_names(count: int) -> list[str]:
    """Return the names of a model's files, as in transformers."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, sizes: list[dict[str, int]]) -> None:
    """Write the index of several files; `sizes` holds each file's tensors and their bytes."""
    if len(sizes) > 1:
        total = sum(sum(some.values()) for some in sizes)
        files = {name: file for some, file in zip(sizes, file_names(len(sizes)), strict=True) for name in some}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def new_safetensors(path: Path, tensors: dict[str, Tensor]) -> Iterator[BufferedWriter]:
    """Open a safetensors file to write these tensors' values in order; it gets its name once complete.

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
    with replaced(path) as unfinished, unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        yield file


def in_rounds(files: list[dict[str, Tensor]], world: int) -> Iterator[list[list[str]]]:
    """Yield rounds: for each rank the next logical tensors of its file, up to `ROUND_BYTES`."""

    def slices(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            for slice_name, shape in logical_shapes(name, tensor.shape).items():
                yield slice_name, tensor.new_empty(shape)

    batches = (batch_by_bytes(slices(tensors), ROUND_BYTES) for tensors in files)
    for wanted in zip_longest(*batches, fillvalue={}):
        yield [list(names) for names in wanted] + [[]] * (world - len(files))  # fewer files than ranks
