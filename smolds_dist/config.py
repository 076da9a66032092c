"""RunConfig: everything a run can be told, as typed dataclasses; presets, YAML files and dotted overrides fill it in.

Every contradiction between two settings is refused here or, where it depends on the machine, in `parallel.topology`.
"""

import base64
import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from smolds_dist.errors import ConfigError, OptionParser

# A whole command line as base64 of JSON, for ways that lead through shells: `--encoded=...`.
ENCODED = "--encoded="
PRESET_DIR = Path(__file__).parent / "presets"


@dataclass
class Run:
    """Where a run lives: `dir`/`name`."""

    name: str | None = None
    """The preset's name where not given."""
    dir: str = "runs"


@dataclass
class Model:
    """The fields of `DeepSeekV3Config`, with its defaults: the reference model of 254,896,512 parameters."""

    vocab_size: int | None = None
    """The tokenizer's where not given; a larger one leaves rows unused."""
    hidden_size: int = 384
    intermediate_size: int = 1024
    """Width of one expert."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    attention: Literal["gqa", "latent"] = "gqa"
    q_lora_rank: int | None = None
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    max_position_embeddings: int = 8192
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    force_uniform_routing: bool = False
    """Tokens take turns among the experts, whatever the router says; for `smolds bench` alone."""

    def architecture(self) -> dict[str, Any]:
        """What `DeepSeekV3Config` takes."""
        fields = dataclasses.asdict(self)
        del fields["force_uniform_routing"]
        return fields


@dataclass
class Source:
    """One of a mixture's sources."""

    source: str
    """As data.source."""
    weight: float = 1.0
    """Its share of the tokens, beside the others' weights; 0 where it has one in a later stage only."""
    max_epochs: float | None = None
    """How often the run may go through it; as often as it needs where not given."""
    text_field: str | None = None
    """As data.text_field, which counts where this is not given."""
    split: str | None = None
    """As data.split, likewise."""
    token_dtype: str | None = None
    """As data.token_dtype, likewise."""


@dataclass
class Stage:
    """A part of the run with weights of its own."""

    until: float
    """Where it ends, as a share of the steps; the last stage ends at 1."""
    weights: dict[str, float] | None = None
    """By source, 0 where not named; those of the sources themselves where not given."""


SOURCE_KINDS = ("stdlib", "text", "jsonl", "parquet", "arrow", "tokens", "hf")


@dataclass
class Data:
    """Corpus, tokenizer and sequence length."""

    source: str = "stdlib"
    """Stdlib | text:GLOB | jsonl:GLOB | parquet:GLOB | arrow:GLOB | tokens:GLOB | hf:NAME[:CONFIG]."""
    sources: dict[str, Source] | None = None
    """A mixture in place of source: a name for each, with its source, weight, max_epochs, text_field and split."""
    stages: list[Stage] | None = None
    """Weights that change on the way: a list of until (a share of the steps) and weights (by source)."""
    text_field: str = "text"
    """Column of jsonl, parquet, arrow and hf sources that holds the text; doc.text is the field text of the field doc."""
    split: str = "train"
    """Of an hf source."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Of a tokens source's flat .bin files."""
    tokenizer: str = "train"
    """"train" (byte-level BPE on the corpus), a folder, or a name on the Hub."""
    tokenizer_vocab_size: int = 8192
    """Of a trained tokenizer."""
    allow_control_tokens: bool = False
    """Text that spells a control token such as <|endoftext|> becomes that token."""
    seq_len: int = 1024
    """Tokens of a sequence."""
    max_tokens: int | None = None
    """Stop reading a source there; an hf source stops after what the run needs."""
    document_mask: bool = False
    """Attention stays within each document, positions begin anew there, and no document's first token is predicted."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents become sequences: cut where one is full, or packed so that none is cut which fits into one."""
    val_fraction: float = 0.005
    """Share of the documents held out."""
    window_tokens: int = 2**28
    """Samples are shuffled within so many tokens, files among each other."""
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    """What to do with a file that is empty or damaged; either way it is named."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that cannot be read or whose text is no string; skipped ones are named in bad_rows.jsonl."""
    workers: Literal["auto"] | int = "auto"
    """Processes that tokenise ahead of the training, on each machine; auto: the cores that ranks leave free, 1 to 16."""
    disk_budget_gb: float | None = None
    """Tokens that lie behind the training are removed where there are more than so many GB, and made again where needed."""
    cache_dir: str = "~/.cache/smolds"

    @property
    def mixed(self) -> dict[str, Source]:
        """The sources in the order of their names, with every field filled in; a single one is named after its kind."""
        given = self.sources or {self.source.partition(":")[0]: Source(self.source)}
        return {
            name: dataclasses.replace(
                one,
                text_field=one.text_field or self.text_field,
                split=one.split or self.split,
                token_dtype=one.token_dtype or self.token_dtype,
            )
            for name, one in sorted(given.items())
        }


def saved_sources(data: dict[str, Any]) -> dict[str, Source]:
    """The sources of a saved `data` section, whose version may be older, as `Data.mixed`."""
    sources = data.get("sources")
    named = {name: Source(**one) for name, one in sources.items()} if sources else None
    known = {name: data[name] for name in ("source", "text_field", "split", "token_dtype") if name in data}
    return Data(**known, sources=named).mixed


@dataclass
class Train:
    """The optimisation."""

    steps: int = 10_000
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    global_batch: int = 32
    """Sequences per step, the same in every topology."""
    micro_batch: int | None = None
    """Sequences per forward pass of one rank; the rest is accumulated."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    """Last share of the steps in which wsd decays."""
    min_lr_fraction: float = 0.1
    """Where the schedule ends, as a share of lr."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    balance: Literal["bias", "aux_loss", "none"] = "bias"
    balance_rate: float = 1e-3
    """Change of a selection bias per step; after the warm-up it falls with the learning rate."""
    aux_loss_coef: float = 0.01
    """Where balance is aux_loss."""
    activation_checkpointing: bool = False
    eval_every: int = 500
    """Steps; 0: only at the end."""
    eval_sequences: int = 128
    """Of the held-out split."""
    nonfinite_limit: int = 10
    """Steps in a row with a NaN or infinite loss or gradient after which the run stops; such a step changes nothing."""
    spike_threshold: float = 0.0
    """Deviations above the recent losses from which a loss is a spike, for instance 8; 0 turns the guard off."""
    spike_steps: int = 3
    """Spikes in a row after which the run goes back to its last checkpoint and leaves the samples since then out."""


@dataclass
class Parallel:
    """The topology; "auto" leaves a choice to `parallel.topology`."""

    engine: Literal["auto", "local", "deepspeed"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    expert: Literal["auto"] | int = "auto"
    """Ranks that share one set of experts."""
    zero: Literal["auto"] | int = "auto"
    """ZeRO stage, 0 to 3."""
    ds_config: str | None = None
    """Your own DeepSpeed JSON instead of ds_configs/zeroN.json."""
    grace: float = 10.0
    """Seconds after a rank's death until the others leave by force."""
    timeout: float = 600.0
    """Seconds without any forward pass after which the ranks count as hanging; 0: wait for ever."""


@dataclass
class Checkpoint:
    """State to continue from."""

    every: int = 1000
    """Steps; 0: none but the one that a signal asks for."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of such steps are kept for good; 0: none."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss too, where evaluated at its step."""
    resume: str = "never"
    """Never | auto (the run of this name, if it has a checkpoint) | a step of this run | a checkpoint's folder."""
    background: bool = True
    """Write while training goes on, from a copy in host memory; off: no copy, and training waits."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written; older ones stay whole."""


@dataclass
class Log:
    """What is written while training."""

    sample_every: int = 500
    """Steps; 0: only at the end."""
    sample_prompts: list[str] = field(default_factory=lambda: ["The "])
    final_prompts: list[str] = field(default_factory=list)
    """Sampled too at the end of the run."""
    sample_tokens: int = 64
    tensorboard: bool = True
    every: float = 15.0
    """Seconds between two lines of progress, where there is no terminal to redraw one."""
    level: Literal["quiet", "normal", "verbose"] = "normal"
    """Quiet (-q): only warnings and errors; verbose (-v): a line for every step, and the whole configuration."""


@dataclass
class Profile:
    """Tracing of what every operation takes."""

    steps: str | None = None
    """FIRST:LAST, both traced, such as 10:13; the trace is written to the run's profile folder."""

    @property
    def first_and_last(self) -> tuple[int, int] | None:
        if self.steps is None:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)


@dataclass
class RunConfig:
    """One run. `validate()` has been called on every RunConfig that `load_config` returns."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    profile: Profile = field(default_factory=Profile)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / str(self.run.name)

    def validate(self) -> None:
        """Refuses what no machine could run.

        Raises:
            ConfigError: naming the setting, the rule and the fix.
        """
        _check_numbers(self)
        _check_model(self)
        if not re.fullmatch(r"[\w.+=-][\w.+= -]*", self.run.name or "") or self.run.name in (".", ".."):
            raise ConfigError(
                f"--run.name {self.run.name!r} cannot be a folder name; use letters, digits, '.', '-', '_', '+' and '='."
            )
        _check_data(self.data)
        if self.profile.steps is not None:
            match = re.fullmatch(r"(\d+):(\d+)", self.profile.steps)
            if not match or not 1 <= int(match[1]) <= int(match[2]) <= self.train.steps:
                raise ConfigError(
                    f"--profile.steps {self.profile.steps!r} is no range of this run's {self.train.steps} steps; write it "
                    "as FIRST:LAST, such as 10:13."
                )
        if self.data.seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"--data.seq_len {self.data.seq_len} is longer than --model.max_position_embeddings "
                f"{self.model.max_position_embeddings}; lower the first or raise the second."
            )
        if self.train.micro_batch and self.train.global_batch % self.train.micro_batch:
            raise ConfigError(
                f"--train.micro_batch {self.train.micro_batch} does not divide --train.global_batch "
                f"{self.train.global_batch}; valid values: {_divisors(self.train.global_batch)}."
            )
        if self.data.disk_budget_gb is not None and not 0 < self.data.disk_budget_gb < math.inf:
            raise ConfigError(
                f"--data.disk_budget_gb {self.data.disk_budget_gb} is out of range; use more than 0, or null."
            )
        if isinstance(self.data.workers, int) and self.data.workers < 0:
            raise ConfigError(f"--data.workers {self.data.workers} is out of range; use auto, or 0 or more.")
        if self.parallel.zero not in ("auto", 0, 1, 2, 3):
            raise ConfigError(f"--parallel.zero {self.parallel.zero} is no ZeRO stage; use auto, 0, 1, 2 or 3.")
        if self.parallel.ds_config and not Path(self.parallel.ds_config).is_file():
            raise ConfigError(
                f"--parallel.ds_config {self.parallel.ds_config!r} is not a file; give a DeepSpeed JSON file."
            )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


_AT_LEAST_ONE = (
    "data.seq_len data.window_tokens data.tokenizer_vocab_size train.steps train.global_batch train.eval_sequences "
    "checkpoint.keep train.nonfinite_limit train.spike_steps "
    "log.sample_tokens model.hidden_size model.intermediate_size model.num_hidden_layers model.num_attention_heads "
    "model.num_key_value_heads model.head_dim model.num_experts model.num_experts_per_tok model.kv_lora_rank "
    "model.qk_nope_head_dim model.qk_rope_head_dim model.v_head_dim model.max_position_embeddings"
).split()
_NOT_NEGATIVE = (
    "train.seed train.warmup_steps train.weight_decay train.grad_clip train.balance_rate train.aux_loss_coef "
    "parallel.grace parallel.timeout train.spike_threshold train.eval_every checkpoint.every checkpoint.keep_every "
    "log.sample_every log.every model.n_shared_experts model.initializer_range"
).split()
_POSITIVE = "train.lr model.rope_theta model.rms_norm_eps model.routed_scaling_factor".split()
_SHARE = "train.decay_fraction train.min_lr_fraction train.beta1 train.beta2 data.val_fraction".split()
_OPTIONAL = "data.max_tokens train.micro_batch model.vocab_size model.q_lora_rank".split()


def _check_numbers(config: RunConfig) -> None:
    def value(name: str) -> float:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    def refuse(name: str, rule: str) -> ConfigError:
        return ConfigError(f"--{name} {value(name)} is out of range; {rule}.")

    for name in _AT_LEAST_ONE:
        if value(name) < 1:
            raise refuse(name, "it must be at least 1")
    for name in _OPTIONAL:
        if value(name) is not None and value(name) < 1:
            raise refuse(name, "it must be at least 1, or null")
    for name in _NOT_NEGATIVE:
        if not 0 <= value(name) < math.inf:
            raise refuse(name, "it must be 0 or more")
    for name in _POSITIVE:
        if not 0 < value(name) < math.inf:
            raise refuse(name, "it must be more than 0")
    for name in _SHARE:
        if not 0 <= value(name) <= 1:
            raise refuse(name, "it must lie between 0 and 1")
    if config.data.seq_len < 2:
        raise refuse("data.seq_len", "it must be at least 2, since each token predicts the next")
    if not 0 < config.data.val_fraction < 0.5:
        raise refuse("data.val_fraction", "it must lie between 0 and 0.5")
    if max(config.train.beta1, config.train.beta2) == 1:
        raise ConfigError("--train.beta1 and --train.beta2 must be less than 1; the usual values are 0.9 and 0.95.")


def _check_data(data: Data) -> None:
    if data.sources is not None and data.source != "stdlib":
        raise ConfigError(
            f"--data.source {data.source!r} and data.sources are both given; leave one out (--data.sources null)."
        )
    if data.sources == {}:
        raise ConfigError("data.sources is empty; name at least one source, or leave it out.")
    if data.packing == "best_fit" and not data.document_mask:
        raise ConfigError(
            "--data.packing best_fit fills sequences up with tokens that only --data.document_mask true leaves out of the "
            "loss; give both."
        )
    for name, one in data.mixed.items():
        option = f"data.sources.{name}.source" if data.sources else "--data.source"
        kind, _, rest = one.source.partition(":")
        if kind not in SOURCE_KINDS:
            kinds = ", ".join(f"{kind}:GLOB" for kind in SOURCE_KINDS[1:-1])
            raise ConfigError(f"{option} {one.source!r} is unknown; use stdlib, {kinds} or hf:NAME.")
        if kind != "stdlib" and not rest:
            raise ConfigError(f"{option} {one.source!r} names nothing to read; write it as {kind}:...")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"data.sources: the name {name!r} is no word; use letters, digits, '.', '-' and '_'.")
        if not 0 <= one.weight < math.inf:
            raise ConfigError(f"data.sources.{name}.weight {one.weight} is out of range; it must be 0 or more.")
        if one.max_epochs is not None and not 0 < one.max_epochs < math.inf:
            raise ConfigError(
                f"data.sources.{name}.max_epochs {one.max_epochs} is out of range; it must be more than 0."
            )
        if kind == "tokens" and data.tokenizer == "train":
            raise ConfigError(
                f"{option} {one.source!r} holds tokens, on which no tokenizer can be trained; give the one that made them "
                "with --data.tokenizer."
            )
    _check_stages(data)


def _check_stages(data: Data) -> None:
    names = ", ".join(data.mixed)
    before = 0.0
    for number, stage in enumerate(data.stages or [], 1):
        if not before < stage.until <= 1:
            raise ConfigError(
                f"data.stages: stage {number} ends at {stage.until}; until must grow from stage to stage, up to 1."
            )
        before = stage.until
        for name, weight in (stage.weights or {}).items():
            if name not in data.mixed:
                raise ConfigError(
                    f"data.stages: stage {number} weighs {name!r}, which is no source; there are {names}."
                )
            if not 0 <= weight < math.inf:
                raise ConfigError(
                    f"data.stages: the weight {weight} of {name!r} is out of range; it must be 0 or more."
                )
    if data.stages is not None and before != 1:
        raise ConfigError("data.stages must end at 1; give the last stage `until: 1.0`.")
    for number, stage in enumerate(data.stages or [Stage(1.0)], 1):
        weights = stage.weights if stage.weights is not None else {n: one.weight for n, one in data.mixed.items()}
        if not sum(weights.values()):
            where = f"stage {number} of data.stages" if data.stages else "data.sources"
            raise ConfigError(f"{where} has no source with a weight; give at least one more than 0.")


def _check_model(config: RunConfig) -> None:
    m = config.model
    if m.attention == "gqa" and m.num_attention_heads % m.num_key_value_heads:
        raise ConfigError(
            f"--model.num_key_value_heads {m.num_key_value_heads} does not divide --model.num_attention_heads "
            f"{m.num_attention_heads}; valid values: {_divisors(m.num_attention_heads)}."
        )
    if m.num_experts_per_tok > m.num_experts:
        raise ConfigError(
            f"--model.num_experts_per_tok {m.num_experts_per_tok} exceeds --model.num_experts {m.num_experts}; lower it."
        )
    name, dims = ("head_dim", m.head_dim) if m.attention == "gqa" else ("qk_rope_head_dim", m.qk_rope_head_dim)
    if dims % 2:
        raise ConfigError(f"--model.{name} {dims} is odd, but rotary embedding turns pairs; use {dims + 1}.")


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load_config(args: list[str], prog: str = "smolds train", benchmark: bool = False) -> RunConfig:
    """The RunConfig of a command line such as `--preset debug --train.steps 50`; options override the preset.

    `--config FILE` (for instance another run's config.yaml) goes over `--preset NAME`, or over the preset that the file
    itself names as `preset: NAME`.

    Args:
        benchmark: allows what would spoil a model.

    Raises:
        ConfigError: for an unknown option, a value of the wrong type, or a contradiction.
    """
    if len(args) == 1 and args[0].startswith(ENCODED):
        args = json.loads(base64.urlsafe_b64decode(args[0].removeprefix(ENCODED)))
    base_parser = OptionParser(add_help=False, allow_abbrev=False)
    base_parser.add_argument("--preset")
    base_parser.add_argument("--config", type=Path)
    base_parser.add_argument("-q", dest="level", action="store_const", const="quiet")
    base_parser.add_argument("-v", dest="level", action="store_const", const="verbose")
    base, rest = base_parser.parse_known_args(args)
    preset, base_files = _base(base.preset, base.config)
    if base.level:
        rest.append(f"--log.level={base.level}")

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--preset NAME] [--config FILE] [--SECTION.FIELD VALUE ...]",
        epilog=f"example: {prog} --preset debug --run.name first --data.source text:'corpus/*.txt' --train.steps 200",
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[*base_files],
    )
    # Only for --help: these were read above, because the preset is the ground that the other options stand on.
    parser.add_argument("--preset", help=f"settings to start from: {', '.join(preset_names())}")
    parser.add_argument(
        "--config",
        help="YAML file that goes over the preset, which it may name (preset: NAME); runs/NAME/config.yaml is one",
    )
    parser.add_argument("-q", action="store_true", help="the same as --log.level quiet")
    parser.add_argument("-v", action="store_true", help="the same as --log.level verbose")
    parser.add_class_arguments(RunConfig)
    try:
        settings = parser.instantiate(parser.parse_args(rest))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(_one_sentence(str(error), parser)) from None
    config = RunConfig(**{f.name: settings[f.name] for f in dataclasses.fields(RunConfig)})
    if config.run.name is None:
        config.run.name = preset or "run"
    config.validate()
    if config.model.force_uniform_routing and not benchmark:
        raise ConfigError(
            "--model.force_uniform_routing trains a router to which nothing listens; it is for smolds bench train and scale."
        )
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Writes every field as YAML that `--config` reads."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")


def _base(preset: str | None, config: Path | None) -> tuple[str | None, list[str]]:
    """The preset to start from, and the files, each over those before it."""
    said_by = "--preset"
    if config and not config.is_file():
        raise ConfigError(f"--config {str(config)!r} is not a file; give a YAML file such as runs/NAME/config.yaml.")
    if config and not preset:
        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            settings = None  # whoever reads the file as settings says what is wrong with it
        preset, said_by = (settings.get("preset") if isinstance(settings, dict) else None), f"{config}: preset"
    if preset and preset not in preset_names():
        raise ConfigError(f"{said_by} {preset!r} is unknown; use one of {', '.join(preset_names())}.")
    return preset, ([str(PRESET_DIR / f"{preset}.yaml")] if preset else []) + ([str(config)] if config else [])


_SHAPES = {
    "data.sources": "give for each name a `source`, and if need be " + ", ".join(f.name for f in fields(Source)[1:]),
    "data.stages": "give a list, each with `until` and if need be `weights` by source",
}


def _one_sentence(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """jsonargparse's message, which may be a paragraph, as one sentence that says what to do."""
    if match := re.match(r'Parser key "([^"]+)":.*(?:Got value|Given value): (.*)$', message, re.DOTALL):
        key, value = match.groups()
        if key in _SHAPES:
            return f"--{key} is not valid; {_SHAPES[key]}."
        kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[([^\]]*)\])", message)
        return f"--{key} {value} is not valid; give {' or '.join(name or values for name, values in kinds)}."
    if match := re.match(r"(?:unrecognized arguments: |Group '(\w+)' does not accept option ')([^\s'=]+)", message):
        group, name = match.groups()
        name = f"--{group}.{name}" if group else name
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, options, n=1)
        return f"{name} is no option; " + (
            f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists them."
        )
    return " ".join(message.split()) + "."
