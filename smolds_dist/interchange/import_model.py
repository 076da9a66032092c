"""`smolds import DIR --to runs/NAME`: a model of transformers' becomes a run to continue training from, in any layout.

`DIR` is what `smolds export` wrote, or another model of one of `transformers_format.CLASSES` whose features all have
counterparts here. Weights are read and written tensor by tensor. The run begins at step 0 with a new optimizer.
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
from smolds_dist.interchange.model_folder import check_settings, check_sizes, weight_files
from smolds_dist.rules import validate
from smolds_dist.settings import Model, RunConfig, Yarn

CHUNK_BYTES = 200_000_000  # of a file of the checkpoint; what is written is held twice


def import_model(args: list[str]) -> None:
    """Makes the run's folder, with its settings, tokenizer and a checkpoint of step 0."""
    options, settings = _parse(args)
    folder, to = options.folder, options.to
    names = [f"--run.dir={to.parent}", f"--run.name={to.name}"]
    config = load_config([*settings, *names], prog="smolds import")  # before the heavy imports

    from smolds_dist.data.tokenizer import save_tokenizer, tokenizer_digest
    from smolds_dist.interchange.transformers_format import CLASSES, UNBIASED

    theirs, ours = read_config(folder)
    tokenizer = read_tokenizer(folder, ours.vocab_size)
    check_sizes(folder, check_settings(folder))
    wanted, config.model = config.model, model_settings(ours)
    tensors = logical_tensors(folder, ours, theirs)
    if options.upcycle:
        how = upcycle.Upcycling(
            options.upcycle_granularity, options.upcycle_noise, options.upcycle_drop, config.train.seed
        )
        config.model = upcycle.upcycled_model(config.model, wanted, how)
        tensors = upcycle.upcycled(tensors, config.model, how)
    config.data.tokenizer = str(to / "tokenizer")
    longest = config.model.max_position_embeddings
    if config.data.seq_len > longest:
        raise ConfigError(
            f"the model takes {longest:,} tokens at most, and sequences would have {config.data.seq_len:,}; give "
            f"--data.seq_len {longest} or less."
        )
    validate(config)
    kind = theirs.model_type
    with new_folder(to) as part:
        save_tokenizer(tokenizer, part / "tokenizer")
        save_config(config, part / "config.yaml")
        write_checkpoint(folder, kind, tensors, config, tokenizer_digest(tokenizer), part / "checkpoints")
    if config.train.balance == "bias" and kind in UNBIASED:
        print(
            f"{CLASSES[kind]} has no selection biases, which --train.balance bias moves: with aux_loss or none in its "
            "place, the run can be exported to that class again"
        )
    print(
        f"{folder} is the run {to}; train it with `smolds train --config {to / 'config.yaml'} --checkpoint.resume auto`"
    )


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the run's settings."""
    parser = OptionParser(
        prog="smolds import",
        description="Makes a run of a model in Hugging Face format, to continue training from. Further options are those of "
        "smolds train, such as --data.source; they become the run's settings.",
        example="smolds import exported --to runs/again --data.source text:'corpus/*.txt'",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the model's folder")
    parser.add_argument("--to", type=Path, required=True, help="the run's folder, such as runs/NAME")
    upcycle.add_options(parser)
    options, settings = parser.parse_known_args(args)
    folder = options.folder
    if not (folder / "config.json").is_file():
        is_run = (folder / "checkpoints").is_dir()
        advice = f"it is a run, whose model is in {folder / 'export'}" if is_run else "name a folder with these"
        raise ConfigError(f"{folder} holds no model, config.json and safetensors files; {advice}.")
    check_free(options.to)
    check_settings(folder)
    upcycle.check_options(options)
    changed = upcycle.CHANGED if options.upcycle else ()
    refused = {f"--model.{field.name}" for field in fields(Model) if field.name not in changed}
    for setting in settings:
        if (name := setting.partition("=")[0]) in refused:
            advice = f"leave it out (--upcycle changes {', '.join(changed)})" if changed else "leave it out"
            raise ConfigError(f"{name} is what the model in {folder} has already; {advice}.")
    return options, settings


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """The tokenizer in `folder`, of a model with that vocabulary.

    Raises:
        ConfigError: where there is none, or one that does not fit.
    """
    from smolds_dist.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(folder))
    except ConfigError:
        raise ConfigError(
            f"{folder} holds no tokenizer that transformers loads, with an end-of-text token; put its tokenizer.json and "
            "tokenizer_config.json there."
        ) from None
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{folder} has a tokenizer of {len(tokenizer):,} tokens and a model of {vocabulary:,}; they do not belong "
            "together."
        )
    return tokenizer


def read_config(folder: Path) -> tuple[Any, Any]:
    """The configuration of the model in `folder`, theirs and ours.

    Raises:
        ConfigError: naming the setting that has no counterpart.
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
            f"{folder} cannot be imported ({first_line(error)}); smolds knows ERNIE 4.5 MoE, DeepSeek-V3, Mixtral, "
            "Qwen3-MoE, OLMoE and Llama models with the features that its own have."
        ) from None


def model_settings(ours: Any) -> Model:
    """The settings `--model.*` of a model's configuration."""
    settings = {field.name: getattr(ours, field.name) for field in fields(Model) if hasattr(ours, field.name)}
    if scaling := settings["rope_scaling"]:
        settings["rope_scaling"] = Yarn(**scaling)
    if not isinstance(settings["eos_token_id"], list):
        settings["eos_token_id"] = None  # it is the tokenizer's
    return Model(**settings)


def write_checkpoint(
    folder: Path, kind: str, given: Iterable[tuple[str, Any]], config: RunConfig, tokenizer: str, root: Path
) -> None:
    """A checkpoint of step 0 that holds weights and selection biases alone.

    Args:
        folder: where the tensors are from.
        kind: transformers' type of the model there.
        given: logical tensors of the model that `config` describes.

    Raises:
        ConfigError: where the files do not hold what the configuration says.
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
    """The tensors of a model of our configuration `ours`, in fp32: those given, and zeros for what only ours have.

    Args:
        shapes: of all that there must be.

    Raises:
        ConfigError: where the files of `folder` do not hold what the configuration says.
    """
    import torch

    from smolds_dist.interchange.transformers_format import CLASSES, to_transformers

    missing = dict(shapes)
    tied: list[torch.Tensor] = []  # the embedding and, where a file has one, the output weight

    def theirs(name: str) -> str:
        """A logical tensor's name in the folder's files."""
        if kind not in CLASSES or name not in shapes:
            return name
        renamed = to_transformers(name, torch.empty(shapes[name], device="meta"), ours, kind)
        return renamed[0] if renamed else name

    for name, tensor in given:
        if ours.tie_word_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight"):
            tied.append(tensor)
            if len(tied) == 2 and not tied[0].equal(tied[1]):
                raise ConfigError(
                    f"{folder} has a lm_head.weight other than its embedding, and its config.json says that they are one; "
                    'write "tie_word_embeddings": false there to keep both, or remove lm_head.weight.'
                )
            if name == "lm_head.weight":
                continue
        if name not in missing and name in shapes:
            raise ConfigError(f"{folder} holds {theirs(name)} twice; leave one of the files that do.")
        if tuple(tensor.shape) != missing.get(name):
            other = f"which should have {list(missing[name])}" if name in missing else "which has no counterpart"
            raise ConfigError(
                f"{folder} has a tensor {theirs(name)} of shape {list(tensor.shape)}, {other}; it is another model."
            )
        if not tensor.isfinite().all():
            raise ConfigError(f"{folder} has numbers in {theirs(name)} that are not finite; get its file anew.")
        del missing[name]
        yield name, tensor.float().contiguous()
    # A model that was balanced in another way has no biases, and one with a single expert no router.
    for name in list(missing):
        is_router = name.endswith(".mlp.gate.weight") and ours.num_experts == 1
        if is_router or name.endswith("e_score_correction_bias"):
            yield name, torch.zeros(missing.pop(name))
    if missing:
        raise ConfigError(f"{folder} lacks the tensor {theirs(next(iter(missing)))}; it is not complete.")


def logical_tensors(folder: Path, ours: Any, theirs: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of the folder's files that counts, under our logical name.

    Raises:
        ConfigError: where a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from smolds_dist.interchange.transformers_format import CLASSES, from_transformers
    from smolds_dist.parallel.fragments import logical_shapes

    further = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  safe_open is no mapping
                    tensor = file.get_tensor(key)
                    if theirs.model_type in CLASSES:
                        renamed = from_transformers(key, tensor, ours, theirs)
                        if renamed is None:
                            further += key.startswith("model.layers.")
                            continue
                        key, tensor = renamed
                    flat = tensor.flatten()
                    for name, shape in logical_shapes(key, tensor.shape).items():
                        size = math.prod(shape)
                        yield name, flat[:size].view(shape)
                        flat = flat[size:]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is damaged ({error}); get it anew.") from None
    if further:
        print(f"{further} tensors of layers that predict further tokens (num_nextn_predict_layers) are left out")
