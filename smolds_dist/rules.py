"""Validation of settings.

Contradictions between settings are rejected here or, if they depend on the machine, in `parallel.topology`.
"""

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from smolds_dist.architecture import contradictions, divisors
from smolds_dist.errors import ABOVE_0, ConfigError, check_range, ranges
from smolds_dist.settings import Data, RunConfig
from smolds_dist.stages import resolve_stages

SOURCE_KINDS = ("stdlib", "text", "jsonl", "parquet", "arrow", "tokens", "hf")
UNSCALED = (None, "constant", "inverse_sqrt", "warmup")  # shapes of the learning rate that 0 makes useless


def validate(config: RunConfig) -> None:
    """Reject settings that cannot work on any machine.

    Raises:
        ConfigError: naming the setting, the rule and the fix.
    """
    for field in fields(config):
        _check_values(getattr(config, field.name), field.name, f"--{field.name}")
    if max(config.train.beta1, config.train.beta2) == 1:
        raise ConfigError("--train.beta1 and --train.beta2 must be less than 1; the usual values are 0.9 and 0.95.")
    if config.train.ema == 1:
        raise ConfigError("--train.ema 1 would keep the initial weights; use a value below 1, usually 0.999.")
    if not re.fullmatch(r"[\w.+=-][\w.+= -]*", config.run.name or "") or config.run.name in (".", ".."):
        raise ConfigError(
            f"--run.name {config.run.name!r} cannot be a folder name; use letters, digits, '.', '-', '_', '+' and '='."
        )
    _check_data(config.data)
    _check_stages(config)
    if config.train.time_budget is not None and config.train.warmup_steps < 2:
        raise ConfigError(
            f"--train.time_budget measures a step during the warm-up, and --train.warmup_steps is "
            f"{config.train.warmup_steps}; set at least 2."
        )
    if config.train.time_budget is not None and config.train.stages:
        raise ConfigError(
            "--train.time_budget changes the number of steps during the run, and train.stages are parts of it; unset one."
        )
    if config.profile.steps is not None:
        match = re.fullmatch(r"(\d+):(\d+)", config.profile.steps)
        if not match or not 1 <= int(match[1]) <= int(match[2]) <= config.train.steps:
            raise ConfigError(
                f"--profile.steps {config.profile.steps!r} is not a range of this run's {config.train.steps} steps; write "
                "FIRST:LAST, such as 10:13."
            )
    check_tracker(config.log.to, "--log.to")
    if config.train.activation_checkpointing == "selective" and config.train.compile is True:
        raise ConfigError(
            "--train.activation_checkpointing selective needs every operator, and --train.compile true fuses them; use "
            "attention, experts or full, or --train.compile false."
        )
    if config.train.qk_clip and config.model.qk_norm:
        raise ConfigError(
            "--train.qk_clip has no effect with --model.qk_norm, which already bounds the logits; unset one."
        )
    if config.parallel.zero not in ("auto", 0, 1, 2, 3):
        raise ConfigError(f"--parallel.zero {config.parallel.zero} is not a ZeRO stage; use auto, 0, 1, 2 or 3.")
    if config.parallel.ds_config is not None and not Path(config.parallel.ds_config).is_file():
        raise ConfigError(
            f"--parallel.ds_config {config.parallel.ds_config!r} is not a file; name a DeepSpeed JSON file."
        )


# Range of every numeric setting
RANGES = ranges({
    (ABOVE_0, 1e30): "train.lr model.rope_theta stage.rope_theta model.routed_scaling_factor",
    (ABOVE_0, 1): "model.latent_norm_eps model.rms_norm_eps",
    (ABOVE_0, 0.5): "data.val_fraction",
    (ABOVE_0, 10**9): "source.max_epochs yarn.beta_fast yarn.beta_slow",
    (0, 1): "train.decay_fraction train.min_lr_fraction train.beta1 train.beta2 train.ema",
    (0, 100): "model.num_nextn_predict_layers",
    (0, 4096): "data.workers",
    (0, 10**6): "train.balance_rate train.aux_loss_coef train.sequence_balance_coef train.z_loss_coef train.mtp_coef "
    "train.weight_decay model.initializer_range model.n_shared_experts model.first_k_dense_replace eval.num_fewshot "
    "yarn.mscale yarn.mscale_all_dim yarn.attention_factor",
    (0, 10**9): "parallel.grace parallel.timeout log.every log.sample_temperature",
    (0, 10**12): "train.warmup_steps train.eval_every parallel.compare_every parallel.check_every checkpoint.every "
    "checkpoint.keep_every log.sample_every log.statistics_every eval.every source.weight",
    (0, 2**62): "train.seed",
    (0, 1e30): "train.grad_clip train.qk_clip train.skip_steps train.spike_threshold stage.lr",
    (1, 10**4): "model.num_hidden_layers train.mup_base_depth",
    (1, 10**6): "model.hidden_size model.intermediate_size model.dense_intermediate_size model.num_attention_heads "
    "model.num_key_value_heads model.head_dim model.num_experts model.num_experts_per_tok model.q_lora_rank "
    "model.kv_lora_rank model.qk_nope_head_dim model.qk_rope_head_dim model.v_head_dim model.n_group model.topk_group "
    "eval.batch_size checkpoint.keep log.sample_tokens parallel.expert yarn.factor train.mup_base_width",
    (1, 10**8): "model.vocab_size data.tokenizer_vocab_size",
    (1, 10**9): "train.global_batch train.micro_batch stage.global_batch stage.micro_batch train.eval_sequences "
    "train.nonfinite_limit train.spike_steps train.time_budget eval.limit model.max_position_embeddings "
    "yarn.original_max_position_embeddings",
    (1, 10**12): "train.steps",
    (1, 10**15): "data.window_tokens data.max_tokens",
    (2, 10**9): "data.seq_len stage.seq_len",
})  # fmt: skip
MAY_BE_EMPTY = ("log.to", "log.sample_prompts", "log.final_prompts", "eval.tasks")


def check_tracker(name: str, option: str) -> None:
    """Raise a `ConfigError` if the tracker's package is not installed."""
    if name and find_spec(name) is None:
        raise ConfigError(f"{option} {name} needs its package; pip install 'smolds-dist[{name}]'.")


def _check_values(part: Any, kind: str, option: str) -> None:
    """Check the numbers and strings of a section, a source or YaRN.

    Args:
        kind: first word of the section's names in `RANGES`.
        option: name of the section in messages.
    """
    for field in fields(part):
        name, value = f"{kind}.{field.name}", getattr(part, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and name in RANGES:
            null = ", or null" if type(None) in get_args(field.type) else ""
            check_range(f"{option}.{field.name}", value, RANGES[name], null)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _check_text(text, f"{option}.{field.name}", name in MAY_BE_EMPTY)


def _check_text(text: str, option: str, may_be_empty: bool) -> None:
    if not text.strip() and not may_be_empty:
        raise ConfigError(f"{option} is empty; set a value, or unset it.")
    if re.search("[\0\ud800-\udfff]", text):
        raise ConfigError(f"{option} {text!r} has invalid characters; use UTF-8 text without NUL.")
    if not may_be_empty and (len(text) > 4000 or any(len(name.encode()) > 255 for name in text.split("/"))):
        raise ConfigError(
            f"{option} {text[:20]!r}... is too long; the limit is 255 bytes for a name and 4,000 for a path."
        )


def _check_data(data: Data) -> None:
    if data.sources is not None and data.source != "stdlib":
        raise ConfigError(
            f"--data.source {data.source!r} and data.sources are both set; unset one (--data.sources null)."
        )
    if data.sources == {}:
        raise ConfigError("data.sources is empty; name at least one source, or unset it.")
    if unquoted := [name for name in data.sources or () if not isinstance(name, str)]:
        raise ConfigError(f"data.sources: YAML reads a name as {unquoted[0]!r}, not as text; quote it, as in 'no'.")
    for name, one in data.mixed.items():
        option = f"data.sources.{name}.source" if data.sources else "--data.source"
        kind, _, rest = one.source.partition(":")
        if kind not in SOURCE_KINDS:
            kinds = ", ".join(f"{kind}:GLOB" for kind in SOURCE_KINDS[1:-1])
            raise ConfigError(f"{option} {one.source!r} is unknown; use stdlib, {kinds} or hf:NAME.")
        if kind != "stdlib" and not rest:
            raise ConfigError(f"{option} {one.source!r} names no files; write {kind}:...")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"data.sources: the name {name!r} is not valid; use letters, digits, '.', '-' and '_'.")
        _check_values((data.sources or data.mixed)[name], "source", f"data.sources.{name}")
        if kind == "tokens" and data.tokenizer == "train":
            raise ConfigError(
                f"{option} {one.source!r} holds tokens, and a tokenizer is trained on text; set --data.tokenizer to the one "
                "that made them."
            )


def _check_stages(config: RunConfig) -> None:
    """Check each stage, and the settings in it."""
    names = ", ".join(config.data.mixed)
    stages = config.train.stages
    if stages == []:
        raise ConfigError("train.stages is empty; list at least one stage, or unset it.")
    for number, stage in enumerate(stages or (), 1):
        name = f"train.stages: stage {number}"
        _check_values(stage, "stage", name)
        for source, weight in (stage.weights or {}).items():
            if source not in config.data.mixed:
                raise ConfigError(f"{name} has a weight for {source!r}, which is not a source; choose from {names}.")
            check_range(f"{name}: {source}", weight, RANGES["source.weight"])
        if stage.until is None and number < len(stages or ()):
            raise ConfigError(f"{name} has no until; only the last stage lasts until the end of the run.")
        if stage.until == 1 and number < len(stages or ()):
            raise ConfigError(
                f"{name}: until 1 is the end of the run, before the next stage; write '1 step' for a step."
            )
        if stage.lr is not None and (stage.lr_shape == "hold" or (not stage.lr and stage.lr_shape in UNSCALED)):
            effect = "holds the rate that it finds" if stage.lr_shape == "hold" else "would train nothing"
            raise ConfigError(
                f"{name}: lr {stage.lr:g} with lr_shape {stage.lr_shape or 'constant'} {effect}; set lr_shape linear or "
                "cosine to reach it, or unset lr."
            )
        if stage.lr_until is not None and stage.lr_shape not in ("warmup", "linear", "cosine"):
            raise ConfigError(f"{name}: lr_until is for lr_shape warmup, linear and cosine; unset it.")
    for span in resolve_stages(config).spans:
        where = f"train.stages: stage {span.number}" if stages else "data.sources"
        if not sum(span.weights.values()):
            raise ConfigError(f"{where} has no source with a weight; set at least one above 0.")
        with span.named_in_errors():
            _check_in_stage(span.config)


def _check_in_stage(config: RunConfig) -> None:
    """Check the settings that a stage can change, and what depends on them."""
    _check_model(config)
    if config.data.seq_len > config.model.max_position_embeddings:
        raise ConfigError(
            f"--data.seq_len {config.data.seq_len} is longer than --model.max_position_embeddings "
            f"{config.model.max_position_embeddings}; lower the first or raise the second."
        )
    if (needed := config.model.num_nextn_predict_layers + 2) > config.data.seq_len:
        raise ConfigError(
            f"--data.seq_len {config.data.seq_len} is too short for --model.num_nextn_predict_layers {needed - 2}, which "
            f"needs {needed} tokens; raise the first, or lower the second."
        )
    if config.train.micro_batch and config.train.global_batch % config.train.micro_batch:
        raise ConfigError(
            f"--train.micro_batch {config.train.micro_batch} does not divide --train.global_batch "
            f"{config.train.global_batch}; valid values: {', '.join(map(str, divisors(config.train.global_batch)))}."
        )
    if config.data.packing == "best_fit" and not config.data.document_mask:
        raise ConfigError(
            "--data.packing best_fit pads sequences with tokens that only --data.document_mask true excludes from the loss; "
            "set both."
        )
    if config.train.cuda_graphs is True and config.data.document_mask:
        raise ConfigError(
            "--train.cuda_graphs true needs batches of one shape, and with --data.document_mask the number of documents "
            "changes; use auto, or unset one."
        )


def _check_model(config: RunConfig) -> None:
    m = config.model
    if found := next(contradictions(m, "--model."), None):
        raise ConfigError(found)
    if yarn := m.rope_scaling:
        _check_values(yarn, "yarn", "--model.rope_scaling")
        if yarn.beta_slow >= yarn.beta_fast:
            raise ConfigError(
                f"--model.rope_scaling.beta_slow {yarn.beta_slow} is not less than beta_fast {yarn.beta_fast}; lower it."
            )
