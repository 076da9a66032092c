"""Checks of a folder in Hugging Face format before transformers reads it: settings in range, only files of the folder."""

import re
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import check_tokenizer_files, printable, read_json

FIX = "download it again"
INDEX = "model.safetensors.index.json"
Size = Annotated[int, Meta(ge=1, le=2**24)]
OrNone = Annotated[int, Meta(ge=0, le=2**24)] | None
Real = Annotated[float, Meta(ge=0, le=1e12)] | None
Ids = Annotated[int, Meta(ge=-1, le=2**24)] | list[Annotated[int, Meta(ge=0, le=2**24)]] | None


@dataclass
class ModelFile:
    """Sizes in a model's config.json, under the names of smolds and of transformers' classes."""

    model_type: str
    vocab_size: Size = 1
    hidden_size: Size = 1
    num_hidden_layers: Annotated[int, Meta(ge=1, le=10_000)] = 1
    intermediate_size: OrNone = None
    moe_intermediate_size: OrNone = None
    num_experts: OrNone = None
    num_local_experts: OrNone = None
    n_routed_experts: OrNone = None
    moe_num_experts: OrNone = None
    num_nextn_predict_layers: OrNone = None

    @property
    def experts(self) -> int:
        return max(
            filter(None, (self.num_experts, self.num_local_experts, self.n_routed_experts, self.moe_num_experts, 1))
        )


# Other checked fields by type
_CHECKED: tuple[tuple[Any, str], ...] = (
    (Size, "num_attention_heads"),
    (Annotated[int, Meta(ge=1, le=2**40)], "max_position_embeddings"),
    (OrNone, "num_key_value_heads head_dim dense_intermediate_size num_experts_per_tok moe_k n_shared_experts "
     "moe_num_shared_experts first_k_dense_replace q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
     "n_group topk_group"),
    (Real, "rope_theta rms_norm_eps initializer_range routed_scaling_factor"),
    (Ids, "bos_token_id eos_token_id pad_token_id"),
    (dict[str, Any] | None, "rope_scaling rope_parameters quantization_config"),
    (list[str] | None, "architectures"),
    (bool, "tie_word_embeddings"),
)  # fmt: skip
_FIELDS = [(name, kind, None) for kind, names in _CHECKED for name in names.split()]
_CheckedFile = make_dataclass("_CheckedFile", _FIELDS, bases=(ModelFile,))


@dataclass
class Index:
    """A safetensors index: the file of each tensor."""

    weight_map: dict[str, str]


def check_settings(folder: Path) -> ModelFile:
    """Check the types and ranges of the folder's settings, without reading its weights.

    Raises:
        ConfigError: names the file, the field and the fix.
    """
    check_tokenizer_files(folder, FIX)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json", FIX, dict[str, Any])
    return read_json(folder / "config.json", FIX, _CheckedFile)


def check_sizes(folder: Path, sizes: ModelFile) -> None:
    """Raise a `ConfigError` if the settings describe a larger model than the weight files hold, before it is allocated."""
    layers, numbers = _stored(folder)
    own = sizes.model_type == "smolds_deepseek_v3"  # other classes load without layers for multi-token prediction
    described = sizes.num_hidden_layers + (sizes.num_nextn_predict_layers or 0) * own
    width, hidden = sizes.moe_intermediate_size or sizes.intermediate_size or 1, sizes.hidden_size
    checks = {
        f"{described:,} layers": described > layers,
        f"a vocabulary of {sizes.vocab_size:,} and a width of {hidden:,}": sizes.vocab_size * hidden > numbers,
        f"{sizes.experts:,} experts of width {width:,}": sizes.experts * width * hidden > numbers,
    }
    if more := next((what for what, is_more in checks.items() if is_more), None):
        held = f"{layers:,} layers, at most {numbers:,} parameters"
        raise ConfigError(
            f"{folder / 'config.json'} specifies {more}, more than its weight files contain ({held}); {FIX}."
        )


def stored_layers(folder: Path) -> int:
    """Return the number of layers in the folder's weight files; reads only headers."""
    return _stored(folder)[0]


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files: those of its index, else model.safetensors, else all.

    Raises:
        ConfigError: if there are none, one is missing, or the index names a path outside the folder.
    """
    index, alone = folder / INDEX, folder / "model.safetensors"
    paths = [alone] if alone.is_file() else sorted(folder.glob("*.safetensors"))
    if index.exists():
        names = sorted(set(read_json(index, FIX, Index).weight_map.values()))
        if outside := [name for name in names if not re.fullmatch(r"\w[\w.+=-]*\.safetensors", name)]:
            raise ConfigError(
                printable(f"{index} names {outside[0][:100]!r}, which is not a safetensors file of its folder; {FIX}.")
            )
        paths = [folder / name for name in names]
    if not paths:
        raise ConfigError(f"{folder} contains no safetensors files; convert the model's weights to safetensors.")
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{folder} lacks {path.name}, which {INDEX} lists; download it.")
    return paths


def _stored(folder: Path) -> tuple[int, int]:
    """Return the number of layers of the weights, and of parameters at most (4 bits each); reads only headers."""
    from safetensors import SafetensorError, safe_open

    layers, paths = 0, weight_files(folder)
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                found = [re.search(r"\.(\d{1,6})\.", key) for key in file.keys()]  # noqa: SIM118  not a mapping
        except (SafetensorError, OSError) as error:
            raise ConfigError(printable(f"{path} is damaged ({error}); {FIX}.")) from None
        layers = max(layers, *(int(layer[1]) + 1 for layer in found if layer), 0)
    return layers, 2 * sum(path.stat().st_size for path in paths)
