"""`smolds import DIR --to runs/NAME`: a model of transformers' becomes a run to continue training from, in any layout.

`DIR` is what `smolds export` wrote, or another ERNIE 4.5 MoE or DeepSeek-V3 model whose features all have counterparts here.
The run begins at step 0 with a new optimizer.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smolds_dist.checkpoint.files import Manifest, checkpoint_name, publish, write_parts
from smolds_dist.checkpoint.new_folder import check_free, new_folder
from smolds_dist.config import RunConfig, load_config, save_config
from smolds_dist.errors import ConfigError, OptionParser


def import_model(args: list[str]) -> None:
    """Makes the run's folder, with its settings, tokenizer and a checkpoint of step 0.

    Raises:
        ConfigError: where the folder holds no model with a counterpart here, or the run exists.
    """
    parser = OptionParser(
        prog="smolds import",
        description="Makes a run of a model in Hugging Face format, to continue training from. Further options are those of "
        "smolds train, such as --data.source; they become the run's settings.",
        example="smolds import exported --to runs/again --data.source text:'corpus/*.txt'",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the model's folder")
    parser.add_argument("--to", type=Path, required=True, help="the run's folder, such as runs/NAME")
    options, settings = parser.parse_known_args(args)
    if not (options.folder / "config.json").is_file():
        raise ConfigError(f"{options.folder} holds no model; name a folder with config.json and safetensors files.")
    check_free(options.to)
    names = [f"--run.dir={options.to.parent}", f"--run.name={options.to.name}"]
    config = load_config([*settings, *names], prog="smolds import")  # before the heavy imports

    from smolds_dist.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_digest

    ours = read_config(options.folder)
    tokenizer = load_tokenizer(str(options.folder))
    for name in config.model.architecture():
        setattr(config.model, name, getattr(ours, name))
    config.data.tokenizer = str(options.to / "tokenizer")
    config.validate()
    with new_folder(options.to) as part:
        save_tokenizer(tokenizer, part / "tokenizer")
        save_config(config, part / "config.yaml")
        write_checkpoint(options.folder, ours, config, tokenizer_digest(tokenizer), part / "checkpoints")
    print(
        f"{options.folder} is the run {options.to}; train it with "
        f"`smolds train --config {options.to / 'config.yaml'} --checkpoint.resume auto`"
    )


def read_config(folder: Path) -> Any:
    """Our configuration of the model in `folder`.

    Raises:
        ConfigError: naming the setting that has no counterpart.
    """
    import transformers

    import smolds_dist.model
    from smolds_dist.interchange.transformers_format import our_config

    try:
        theirs = transformers.AutoConfig.from_pretrained(folder)
        if isinstance(theirs, smolds_dist.model.DeepSeekV3Config):
            return theirs
        return our_config(theirs)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{folder} cannot be imported ({reason}); smolds knows ERNIE 4.5 MoE and DeepSeek-V3 models that have a mixture "
            "in every layer."
        ) from None


def write_checkpoint(folder: Path, ours: Any, config: RunConfig, tokenizer: str, root: Path) -> None:
    """A checkpoint of step 0 that holds weights and selection biases alone.

    Raises:
        ConfigError: where the files do not hold what the configuration says.
    """
    import torch

    from smolds_dist.checkpoint.writer import Progress, package_versions
    from smolds_dist.model import DeepSeekV3ForCausalLM
    from smolds_dist.parallel.fragments import tensor_shapes
    from smolds_dist.parallel.ranks import RankInfo
    from smolds_dist.parallel.topology import Topology, detect_machine, plan_topology

    with torch.device("meta"):
        model = DeepSeekV3ForCausalLM(ours)
    shapes = tensor_shapes(model)
    biases = {name: tuple(b.shape) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    missing = dict(shapes | biases)
    unfinished = root / f"unfinished_{checkpoint_name(0)}"
    unfinished.mkdir(parents=True)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in logical_tensors(folder, ours):
            if name == "lm_head.weight" and ours.tie_word_embeddings:
                continue
            if tuple(tensor.shape) != missing.get(name):
                wanted = f"of {list(missing[name])}" if name in missing else "that has no counterpart"
                raise ConfigError(
                    f"{folder} has a tensor {name} of shape {list(tensor.shape)}, {wanted}; it is another model."
                )
            del missing[name]
            yield f"{name}:value:0", tensor.float().flatten().contiguous()
        for name in biases:
            if missing.pop(name, None):  # a model that was balanced in another way
                yield f"{name}:value:0", torch.zeros(ours.num_experts)
        if missing:
            raise ConfigError(f"{folder} lacks the tensor {next(iter(missing))}; it is not complete.")

    files = write_parts(unfinished, tensors())
    topology: Topology = plan_topology(config, detect_machine(), RankInfo())
    manifest = Manifest(
        **asdict(Progress()),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        optimizer_steps=0,
        val_loss=None,
        config=asdict(config),
        topology=asdict(topology),
        data={"train_tokens": None, "tokenizer": tokenizer},
        versions=package_versions(),
        tensors={name: list(shape) for name, shape in shapes.items()},
        files=files,
        weights_only=True,
    )
    publish(unfinished, manifest)


def logical_tensors(folder: Path, ours: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of the folder's files, under our logical name.

    Raises:
        ConfigError: where a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    import smolds_dist.model
    from smolds_dist.interchange.transformers_format import from_transformers
    from smolds_dist.parallel.fragments import logical_shapes

    is_ours = (
        json.loads((folder / "config.json").read_text())["model_type"] == smolds_dist.model.DeepSeekV3Config.model_type
    )
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{folder} holds no safetensors files; convert the model's weights to them.")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  safe_open is no mapping
                    tensor = file.get_tensor(key)
                    if not is_ours:
                        yield from_transformers(key, tensor, ours)
                        continue
                    flat = tensor.flatten()
                    for name, shape in logical_shapes(key, tensor.shape).items():
                        size = math.prod(shape)
                        yield name, flat[:size].view(shape)
                        flat = flat[size:]
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}); get it anew.") from None
