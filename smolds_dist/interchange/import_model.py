"""`smolds import DIR --to runs/NAME`: turn a transformers model into a run to continue training, in any layout.

`DIR` is an export of `smolds export`, or another model of `transformers_format.CLASSES` whose features all have
counterparts here. Weights are read and written tensor by tensor. The run starts at step 0 with a new optimizer.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from smolds_dist.checkpoint.files import checkpoint_name, finalize, write_tensor_files
from smolds_dist.checkpoint.new_folder import check_free, new_folder
from smolds_dist.config import load_config, save_config
from smolds_dist.errors import ConfigError, OptionParser, first_line
from smolds_dist.interchange import upcycle
from smolds_dist.interchange.model_folder import check_settings, check_sizes, stored_layers, weight_files
from smolds_dist.rules import validate
from smolds_dist.settings import Model, RunConfig, Yarn

CHUNK_BYTES = 200_000_000  # of a checkpoint file; held in memory twice while it is written


def import_model(args: list[str]) -> None:
    """Create the run's folder with settings, tokenizer and a checkpoint of step 0."""
    options, settings = _parse(args)
    folder, to = options.folder, options.to
    names = [f"--run.dir={to.parent}", f"--run.name={to.name}"]
    config = load_config([*settings, *names], prog="smolds import")  # before the heavy imports

    from smolds_dist.data.tokenizer import save_tokenizer, tokenizer_digest
    from smolds_dist.interchange.transformers_format import CLASSES, UNBIASED

    theirs, ours = read_config(folder)
    tokenizer = read_tokenizer(folder, ours.vocab_size)
    check_sizes(folder, check_settings(folder))
    if theirs.model_type == "deepseek_v3":  # some folders have the field without the layers
        further = stored_layers(folder) - ours.num_hidden_layers
        ours.num_nextn_predict_layers = min(theirs.num_nextn_predict_layers or 0, further)
    requested, config.model = config.model, model_settings(ours)
    tensors = logical_tensors(folder, ours, theirs)
    if options.upcycle:
        upcycling = upcycle.Upcycling(
            options.upcycle_granularity, options.upcycle_noise, options.upcycle_drop, config.train.seed
        )
        config.model = upcycle.upcycled_model(config.model, requested, upcycling)
        tensors = upcycle.upcycled(tensors, config.model, upcycling)
    config.data.tokenizer = str(to / "tokenizer")
    longest = config.model.max_position_embeddings
    if config.data.seq_len > longest:
        raise ConfigError(
            f"the model supports at most {longest:,} tokens, but --data.seq_len is {config.data.seq_len:,}; set it to "
            f"{longest} or less."
        )
    validate(config)
    kind = theirs.model_type
    with new_folder(to) as unfinished:
        save_tokenizer(tokenizer, unfinished / "tokenizer")
        save_config(config, unfinished / "config.yaml")
        write_checkpoint(folder, kind, tensors, config, tokenizer_digest(tokenizer), unfinished / "checkpoints")
    if config.train.balance == "bias" and kind in UNBIASED:
        print(
            f"{CLASSES[kind]} has no selection biases, which --train.balance bias updates; use aux_loss or none to be able "
            "to export the run to that class again"
        )
    print(
        f"imported {folder} to {to}; train with `smolds train --config {to / 'config.yaml'} --checkpoint.resume auto`"
    )


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and the run's settings."""
    parser = OptionParser(
        prog="smolds import",
        description="Import a model in Hugging Face format as a run, to continue training. Other options are those of "
        "smolds train, such as --data.source; they become the run's settings.",
        example="smolds import exported --to runs/again --data.source text:'corpus/*.txt'",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the model")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new run, such as runs/NAME")
    upcycle.add_options(parser)
    options, settings = parser.parse_known_args(args)
    folder = options.folder
    if not (folder / "config.json").is_file():
        is_run = (folder / "checkpoints").is_dir()
        advice = f"it is a run, whose model is in {folder / 'export'}" if is_run else "use a folder with these files"
        raise ConfigError(f"{folder} is not a model with config.json and safetensors files; {advice}.")
    check_free(options.to)
    check_settings(folder)
    upcycle.check_options(options)
    changed = upcycle.CHANGED if options.upcycle else ()
    fixed = {f"--model.{field.name}" for field in fields(Model) if field.name not in changed}
    for setting in settings:
        if (name := setting.partition("=")[0]) in fixed:
            advice = f"remove it (--upcycle changes {', '.join(changed)})" if changed else "remove it"
            raise ConfigError(f"{name} is determined by the model in {folder}; {advice}.")
    return options, settings


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Return the tokenizer in `folder`, for a model with that vocabulary size.

    Raises:
        ConfigError: if it is missing or does not fit.
    """
    from smolds_dist.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(folder))
    except ConfigError:
        raise ConfigError(
            f"{folder} has no tokenizer that transformers can load, with an end-of-text token; add its tokenizer.json and "
            "tokenizer_config.json."
        ) from None
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{folder} has a tokenizer of {len(tokenizer):,} tokens but a model with a vocabulary of {vocabulary:,}; use "
            "matching files."
        )
    return tokenizer


def read_config(folder: Path) -> tuple[Any, Any]:
    """Return the configuration of the model in `folder`, theirs and ours.

    Raises:
        ConfigError: if a setting has no counterpart; names it.
    """
    import transformers

    import smolds_dist.model
    from smolds_dist.interchange.transformers_format import our_config

    try:
        theirs = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
            theirs.eos_token_id = theirs.eos_token_id if ends is None else ends
        if isinstance(theirs, smolds_dist.model.DeepSeekV3Config):
            return theirs, theirs
        return theirs, our_config(theirs)
    except (ValueError, TypeError, OSError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{folder} cannot be imported ({first_line(error)}); smolds supports ERNIE 4.5 MoE, DeepSeek-V3, Mixtral, "
            "Qwen3-MoE, OLMoE and Llama models with features that smolds' own models have."
        ) from None


def model_settings(ours: Any) -> Model:
    """Return the settings `--model.*` of a model's configuration."""
    settings = {field.name: getattr(ours, field.name) for field in fields(Model) if hasattr(ours, field.name)}
    if scaling := settings["rope_scaling"]:
        settings["rope_scaling"] = Yarn(**scaling)
    if not isinstance(settings["eos_token_id"], list):
        settings["eos_token_id"] = None  # then the tokenizer's
    return Model(**settings)


def write_checkpoint(
    folder: Path, kind: str, given: Iterable[tuple[str, Any]], config: RunConfig, tokenizer: str, root: Path
) -> None:
    """Write a checkpoint of step 0 that holds only weights and selection biases.

    Args:
        folder: source of the tensors.
        kind: transformers' type of the model there.
        given: logical tensors of the model that `config` describes.

    Raises:
        ConfigError: if the files do not match the configuration.
    """
    import torch

    from smolds_dist.checkpoint.writer import TrainState, new_manifest
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
    from smolds_dist.parallel.fragments import tensor_shapes
    from smolds_dist.parallel.ranks import RankInfo
    from smolds_dist.parallel.topology import detect_machine, plan_topology

    ours = DeepSeekV3Config(**config.model.architecture())
    with torch.device("meta"):
        built = DeepSeekV3ForCausalLM(ours)
    shapes = tensor_shapes(built)
    biases = {name: tuple(b.shape) for name, b in built.named_buffers() if name.endswith("e_score_correction_bias")}
    unfinished = root / f"unfinished_{checkpoint_name(0)}"
    unfinished.mkdir(parents=True)
    tensors = check_tensors(folder, kind, given, ours, shapes | biases)
    files = write_tensor_files(unfinished, ((f"{name}:value:0", one.flatten()) for name, one in tensors), CHUNK_BYTES)
    topology = plan_topology(config, detect_machine(), RankInfo())
    of_import: dict[str, Any] = {"optimizer_steps": 0, "val_loss": None, "files": files, "weights_only": True}
    finalize(unfinished, new_manifest(config, topology, TrainState(), {"tokenizer": tokenizer}, shapes, **of_import))


def check_tensors(
    folder: Path, kind: str, given: Iterable[tuple[str, Any]], ours: Any, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a model of our configuration `ours` in fp32: those given, and zeros for what only ours has.

    Args:
        shapes: of all tensors of the model.

    Raises:
        ConfigError: if the files of `folder` do not match the configuration.
    """
    import torch

    from smolds_dist.interchange.transformers_format import CLASSES, to_transformers

    missing = dict(shapes)
    tied: list[torch.Tensor] = []  # the embedding and, if a file has one, the output weight

    def theirs(name: str) -> str:
        """Return a logical tensor's name in the folder's files."""
        if kind not in CLASSES or name not in shapes:
            return name
        renamed = to_transformers(name, torch.empty(shapes[name], device="meta"), ours, kind)
        return renamed[0] if renamed else name

    for name, tensor in given:
        if ours.tie_word_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight"):
            tied.append(tensor)
            if len(tied) == 2 and not tied[0].equal(tied[1]):
                raise ConfigError(
                    f"{folder} has an lm_head.weight that differs from its embedding, but its config.json ties them; set "
                    '"tie_word_embeddings": false there to keep both, or remove lm_head.weight.'
                )
            if name == "lm_head.weight":
                continue
        if name not in missing and name in shapes:
            raise ConfigError(f"{folder} has {theirs(name)} twice; remove one of its files.")
        if tuple(tensor.shape) != missing.get(name):
            other = f"which should have {list(missing[name])}" if name in missing else "which has no counterpart"
            raise ConfigError(
                f"{folder} has a tensor {theirs(name)} of shape {list(tensor.shape)}, {other}; use this config's weights."
            )
        if not tensor.isfinite().all():
            raise ConfigError(f"{folder} has values in {theirs(name)} that are not finite; download its file again.")
        del missing[name]
        yield name, tensor.float().contiguous()
    # A model that was balanced otherwise has no biases; one with a single expert has no router.
    for name in list(missing):
        is_router = name.endswith(".mlp.gate.weight") and ours.num_experts == 1
        if is_router or name.endswith("e_score_correction_bias"):
            yield name, torch.zeros(missing.pop(name))
    if missing:
        raise ConfigError(f"{folder} lacks the tensor {theirs(next(iter(missing)))}; download it again.")


def logical_tensors(folder: Path, ours: Any, theirs: Any) -> Iterator[tuple[str, Any]]:
    """Yield every relevant tensor of the folder's files under its logical name.

    Raises:
        ConfigError: if a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from smolds_dist.interchange.transformers_format import CLASSES, from_transformers, layer_of
    from smolds_dist.parallel.fragments import logical_shapes

    layers = ours.num_hidden_layers + ours.num_nextn_predict_layers
    further = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  not a mapping
                    tensor = file.get_tensor(key)
                    if theirs.model_type in CLASSES:
                        renamed = from_transformers(key, tensor, ours, theirs)
                        if renamed is None:
                            further += layer_of(key) >= layers
                            continue
                        key, tensor = renamed
                    flat = tensor.flatten()
                    for name, shape in logical_shapes(key, tensor.shape).items():
                        size = math.prod(shape)
                        yield name, flat[:size].view(shape)
                        flat = flat[size:]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is damaged ({error}); download it again.") from None
    if further:
        print(f"{further} tensors of multi-token prediction layers skipped")


def read_model(folder: Path) -> tuple[Any, Any]:
    """Return smolds' model, in fp32 on the CPU, and the tokenizer of a folder in Hugging Face format.

    Raises:
        ConfigError: if the model has no counterpart here, or its files do not match its configuration.
    """
    import torch

    from smolds_dist.model import empty_model
    from smolds_dist.parallel.fragments import fill_parameters, tensor_shapes

    check_sizes(folder, check_settings(folder))
    theirs, ours = read_config(folder)
    tokenizer = read_tokenizer(folder, ours.vocab_size)
    model = empty_model(ours)
    views = {name: bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")}
    shapes = tensor_shapes(model) | {name: tuple(bias.shape) for name, bias in views.items()}
    fill_parameters(model, lambda fragment: views.update({fragment.name: fragment.tensors["value"]}))
    given = logical_tensors(folder, ours, theirs)
    with torch.no_grad():
        for name, tensor in check_tensors(folder, theirs.model_type, given, ours, shapes):
            views[name].copy_(tensor.flatten())
    return model, tokenizer
