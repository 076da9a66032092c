"""`smolds export RUN --to DIR`: export a checkpoint of any layout as a folder that plain transformers loads, or as GGUF.

Tensors are read from the checkpoint and written one by one, so memory is bounded by one output file, whatever the model's
size. Then the export is checked: a process without smolds loads it, and its logits must equal ours.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from smolds_dist.checkpoint.files import (
    CheckpointReader,
    Manifest,
    batch_by_bytes,
    checkpoints_in,
    find_damage,
    open_verified,
    select,
)
from smolds_dist.checkpoint.new_folder import check_free, new_file, new_folder
from smolds_dist.errors import ConfigError, OptionParser, first_line
from smolds_dist.files import path_in_errors, replace_text

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TOLERANCE = 1e-3  # difference between transformers' logits and ours in fp32, relative to the largest
CHECK = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
if sys.argv[3] == "smolds":
    import smolds_dist.model
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=load_file(sys.argv[2])["ids"], use_cache=False).logits
assert sys.argv[3] == "smolds" or "smolds_dist" not in sys.modules
save_file({"logits": logits}, sys.argv[2])
"""


def export(args: list[str]) -> None:
    """Write the folder, check it, and with --push upload it."""
    options = _parse(args)

    from smolds_dist.interchange.model_card import write_card

    folder = find_checkpoint(options.source, options.step)
    check_free(options.to)
    if options.format == "gguf" and (options.to.suffix != ".gguf" or options.to.exists()):
        raise ConfigError(f"--to {options.to} is not a new file for --format gguf; choose a name such as model.gguf.")
    reader, config, tokenizer = open_model(folder, options.weights)
    dtype = reader.manifest.topology["dtype"] if options.dtype == "auto" else options.dtype
    if options.format == "gguf":
        _export_gguf(folder, reader, config, tokenizer, dtype, options)
        return
    with new_folder(options.to) as unfinished:
        write(reader, config, tokenizer, unfinished, options.format, dtype, options.max_shard_bytes)
        write_card(unfinished, folder, reader.manifest, config, options.format, options.weights == "ema")
        if options.check:
            check(reader, config, unfinished, options.format, dtype)
    print(f"exported {folder} to {options.to}{', which computes the same logits' if options.check else ''}")
    if options.push:
        push(options.to, options.push)


def _export_gguf(
    folder: Path, reader: CheckpointReader, config: Any, tokenizer: Any, dtype: str, options: argparse.Namespace
) -> None:
    from smolds_dist.interchange.gguf_format import modelfile, write_gguf

    to = options.to
    description, text = modelfile(to, bool(tokenizer.chat_template))
    with new_file(to) as unfinished:
        name, biases = folder.resolve().parent.parent.name, reader.selection_biases()
        if config.num_nextn_predict_layers:
            report_left_out(config, "GGUF")
        write_gguf(unfinished, name, reader, biases, config, tokenizer, dtype, options.quantize, options.check)
        replace_text(description, text)
    checked = ", and compared the file with it" if options.check else ""
    print(f"exported {folder} to {to}{checked}; {description} describes it to Ollama")


def _parse(args: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="smolds export",
        description="Export a checkpoint of any layout as a model for plain transformers or llama.cpp.",
        example="smolds export runs/first --to exported --dtype bf16",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run (runs/NAME) or a checkpoint")
    parser.add_argument(
        "--to", type=Path, required=True, help="output folder; with --format gguf, output file NAME.gguf"
    )
    parser.add_checkpoint_options(default="the newest")
    parser.add_argument(
        "--format",
        choices=("transformers", "smolds", "gguf"),
        default="transformers",
        help="program that loads it; gguf = llama.cpp, Ollama and LM Studio",
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the weights; auto = the run's"
    )
    parser.add_argument("--quantize", choices=("q8_0",), help="8-bit quantization of matrices; needs --format gguf")
    size = "maximum file size, such as 500MB; bounds memory too"
    parser.add_argument("--max-shard-size", default="1GB", metavar="SIZE", help=size)
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not load the export and compare its logits"
    )
    push = "Hub repository to upload to; HF_TOKEN authenticates"
    parser.add_argument("--push", metavar="NAME", help=push)
    options = parser.parse_args(args)
    if options.quantize and options.format != "gguf":
        parser.error(f"--quantize {options.quantize} needs --format gguf")
    if options.push and options.format == "gguf":
        parser.error("--push does not support --format gguf; use `hf upload NAME FILE`")
    options.max_shard_bytes = size_in_bytes(options.max_shard_size)
    return options


def size_in_bytes(size: str) -> int:
    """Return the bytes of a size in the form of transformers' `max_shard_size`, such as 5GB or 500MB.

    Raises:
        ConfigError: if it is not a size, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([KMGT])B", size.upper())
    found = int(float(match[1]) * 1000 ** (" KMGT".index(match[2]))) if match else 0
    if not found:
        raise ConfigError(f"--max-shard-size {size!r} is not a file size; use one such as 5GB or 500MB.")
    return found


def find_checkpoint(source: Path, step: int | None) -> Path:
    """Return the checkpoint that `source` names: itself, or one of a run, by default the newest undamaged one.

    Raises:
        ConfigError: if there is none.
    """
    if (source / "manifest.json").is_file():
        return source.resolve()
    if step is not None:
        return select(source, [step])[0]
    folders = checkpoints_in(source / "checkpoints")
    complete = next((folder for folder in folders if not find_damage(folder, contents=False)), None)
    if complete is None:
        raise ConfigError(f"{source} contains no complete checkpoint; use a run's folder, such as runs/NAME.")
    return complete


def open_model(folder: Path, weights: str = "trained") -> tuple[CheckpointReader, Any, Any]:
    """Return a checkpoint's verified contents, and its model's configuration and tokenizer.

    Args:
        weights: what the reader returns as the weights: "trained", or "ema", their moving averages.

    Raises:
        ConfigError: if the checkpoint is damaged, or its tokenizer or the moving averages are missing.
    """
    reader = open_verified(folder)
    if weights == "ema":
        reader.use_ema()
    tokenizer = tokenizer_of(folder, reader.manifest)
    return reader, model_config(reader.manifest, tokenizer), tokenizer


def tokenizer_of(folder: Path, manifest: Manifest) -> Any:
    """Return the tokenizer that a checkpoint's run was trained with.

    Raises:
        ConfigError: if it is neither in the run's folder nor where the run loaded it from.
    """
    from smolds_dist.data.tokenizer import load_tokenizer, tokenizer_digest

    run, name = folder.parent.parent, manifest.config["data"]["tokenizer"]
    paths = [str(path) for path in (run / "tokenizer", run / "export") if (path / "tokenizer.json").is_file()]
    for path in paths + ([name] if name != "train" else []):
        tokenizer = load_tokenizer(path)
        if tokenizer_digest(tokenizer) == manifest.data["tokenizer"]:
            return tokenizer
    raise ConfigError(f"{run} does not contain the tokenizer it was trained with; copy it to {run / 'tokenizer'}.")


def model_config(manifest: Manifest, tokenizer: Any) -> Any:
    """Return smolds' configuration of a checkpoint's model."""
    from smolds_dist.model import DeepSeekV3Config
    from smolds_dist.settings import Model

    architecture = Model(**manifest.config["model"]).architecture(tokenizer)
    vocab, hidden = (*manifest.tensors.get("model.embed_tokens.weight", ()), 0, 0)[:2]
    layers = {name.split(".")[2] for name in manifest.tensors if name.startswith("model.layers.")}
    described = architecture["num_hidden_layers"] + architecture["num_nextn_predict_layers"]
    if hidden != architecture["hidden_size"] or len(layers) != described:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} has {len(layers)} layers and width {hidden}, but its config says "
            f"{described} and {architecture['hidden_size']}; restore it from a copy."
        )
    architecture["vocab_size"] = vocab
    return DeepSeekV3Config(**architecture)


def write(
    reader: CheckpointReader, config: Any, tokenizer: Any, folder: Path, kind: str, dtype: str, file_bytes: int
) -> None:
    """Write configuration, tokenizer, and weights in files of at most `file_bytes`.

    Raises:
        ConfigError: if transformers has no class that computes the same.
    """
    from transformers import GenerationConfig

    from smolds_dist.data.tokenizer import save_tokenizer
    from smolds_dist.interchange.transformers_format import CLASSES, save_config, transformers_config

    written = config
    if kind == "transformers":
        biased = any(bool(bias.any()) for bias in reader.selection_biases().values())
        try:
            written = transformers_config(config, biased)
        except ValueError as error:
            raise ConfigError(f"{str(error).rstrip('.')}; use --format smolds.") from None
        tensors = _for_transformers(reader, config, written.model_type)
        if config.num_nextn_predict_layers and written.model_type != "deepseek_v3":
            report_left_out(config, CLASSES[written.model_type])
    else:
        tensors = _for_smolds(reader, config)
    written.architectures = [CLASSES.get(written.model_type, "DeepSeekV3ForCausalLM")]
    written.dtype = DTYPES[dtype]
    save_config(written, folder)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**ends, do_sample=True, temperature=0.6, top_k=50).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    _write_files(tensors, folder, DTYPES[dtype], file_bytes)


def report_left_out(config: Any, format_name: str) -> None:
    """Print that a format has no layers for multi-token prediction."""
    count = config.num_nextn_predict_layers
    print(f"{format_name} has no layers for multi-token prediction; the export lacks the model's {count}")


def _for_transformers(reader: CheckpointReader, config: Any, model_type: str) -> Iterator[tuple[str, Any]]:
    from smolds_dist.interchange.transformers_format import SHARED_COPIES, to_transformers

    ours = ((name, reader.read_full(name, "value")) for name in reader.manifest.tensors)
    for name, tensor in chain(ours, reader.selection_biases().items()):
        if renamed := to_transformers(name, tensor, config, model_type):
            yield renamed
    if config.tie_word_embeddings and model_type in ("deepseek_v3", "mixtral"):
        # Stored twice, because mlx-lm and vLLM expect an output weight of these classes.
        yield "lm_head.weight", reader.read_full("model.embed_tokens.weight", "value")
    for depth in range(config.num_nextn_predict_layers if model_type == "deepseek_v3" else 0):
        for copy, name in SHARED_COPIES.items():
            stored = "model.embed_tokens.weight" if config.tie_word_embeddings else name
            layer = config.num_hidden_layers + depth
            yield f"model.layers.{layer}.{copy}.weight", reader.read_full(stored, "value")


def _for_smolds(reader: CheckpointReader, config: Any) -> Iterator[tuple[str, Any]]:
    """Yield tensors with stacked experts, as in smolds' own model."""
    import torch

    from smolds_dist.model import DeepSeekV3ForCausalLM
    from smolds_dist.parallel.fragments import logical_shapes, split_by_tensor

    with torch.device("meta"):
        model = DeepSeekV3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape)
        for fragment in split_by_tensor(logical_shapes(name, parameter.shape), 0, {"value": tensor.view(-1)}):
            reader.fill(fragment)
        yield name, tensor
    yield from reader.selection_biases().items()


def build_model(reader: CheckpointReader, config: Any) -> Any:
    """Return smolds' model, in fp32 on the CPU, with a checkpoint's weights and selection biases."""
    import torch

    from smolds_dist.model import DeepSeekV3ForCausalLM, empty_model
    from smolds_dist.parallel.fragments import fill_parameters, tensor_shapes

    with torch.device("meta"):
        shapes = tensor_shapes(DeepSeekV3ForCausalLM(config))
    if shapes != {name: tuple(shape) for name, shape in reader.manifest.tensors.items()}:
        raise ConfigError(f"{reader.folder} has tensors that do not match its config; restore it from a copy.")
    model = empty_model(config)
    fill_parameters(model, reader.fill)
    for name, bias in reader.selection_biases().items():
        model.get_buffer(name).copy_(bias)
    return model


def _write_files(tensors: Iterator[tuple[str, Any]], folder: Path, dtype: str, file_bytes: int) -> None:
    """Write safetensors files named as in transformers, with an index if there are several."""
    import torch
    from safetensors.torch import save_file

    from smolds_dist.interchange.final_export import file_names, write_index

    def converted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            bias = name.endswith("e_score_correction_bias")
            yield name, (tensor if bias else tensor.to(getattr(torch, dtype))).contiguous()

    sizes: list[dict[str, int]] = []
    for batch in batch_by_bytes(converted(), file_bytes):
        file = folder / f"unnamed-{len(sizes)}"
        save_file(batch, file, metadata={"format": "pt"})
        file.chmod(0o644)
        sizes.append({name: tensor.nbytes for name, tensor in batch.items()})
    for number, name in enumerate(file_names(len(sizes))):
        (folder / f"unnamed-{number}").rename(folder / name)
    write_index(folder, sizes)


def check(reader: CheckpointReader, config: Any, folder: Path, kind: str, dtype: str) -> None:
    """Load the export in another process and compare its logits with ours, both from weights of the same rounding.

    Raises:
        ConfigError: if our logits are not finite.
        RuntimeError: if they differ, which no input should cause.
    """
    import torch
    from safetensors.torch import load_file, save_file

    ids = torch.randint(0, config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    model = build_model(reader, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, DTYPES[dtype])))
        ours = model(input_ids=ids, use_cache=False).logits
    del model  # one model in memory at a time
    if not ours.isfinite().all():
        raise ConfigError(
            "the checkpoint's logits are not finite, so the training has diverged; choose an earlier one with --step."
        )
    isolated = ["-I"] if kind == "transformers" else []  # does not import anything of smolds
    with tempfile.TemporaryDirectory() as scratch, path_in_errors(path := Path(scratch) / "tensors", path):
        save_file({"ids": ids}, path)
        finished = subprocess.run(
            [sys.executable, *isolated, "-c", CHECK, str(folder), str(path), kind],
            capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if finished.returncode:
            raise RuntimeError(f"the export does not load: {finished.stderr.strip()[-2000:]}")
        theirs = load_file(path)["logits"]
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE * ours.abs().max().item():
        raise RuntimeError(f"the export's logits differ from the checkpoint's by {difference:.2g}")


def push(folder: Path, name: str) -> None:
    """Upload an export to a repository of the Hub, created if missing.

    Raises:
        ConfigError: if the upload fails; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name)
    except Exception as error:  # the Hub's client has no common type for errors of network, token and name
        raise ConfigError(
            f"{folder} could not be pushed to {name!r} ({first_line(error)}); the local folder is complete: check HF_TOKEN "
            f"and the network, and push it with `hf upload {name} {folder}`."
        ) from None
    print(f"pushed to {api.endpoint}/{name}")
