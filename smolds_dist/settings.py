"""All settings of a run, as typed dataclasses. `rules` validates combinations; `config` fills in defaults."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Recomputed = Literal["none", "attention", "experts", "selective", "full"]


@dataclass
class Run:
    """The run's folder, `dir`/`name`."""

    name: str | None = None
    """Run name; default: the preset's."""
    dir: str = "runs"
    """Parent folder of runs."""


@dataclass
class Yarn:
    """YaRN scaling of rotary embeddings, for contexts longer than in pre-training (arXiv 2309.00071)."""

    factor: float
    """Ratio of the new context length to the original, 1 or more."""
    original_max_position_embeddings: int
    """Context length of the original training in tokens."""
    beta_fast: float = 32.0
    """Rotations within the original context above which a channel is not scaled."""
    beta_slow: float = 1.0
    """Rotations within the original context below which a channel is scaled by factor."""
    mscale: float | None = None
    """Coefficient of the attention scale, as in DeepSeek-V3; default: none."""
    mscale_all_dim: float | None = None
    """Coefficient of the attention scale over all channels; default: none."""
    attention_factor: float | None = None
    """Ratio by which cosines and sines are scaled; default: from factor."""
    truncate: bool = True
    """Round the bounds of scaled channels to integers."""
    rope_type: Literal["yarn"] = "yarn"
    """Name of the scaling in transformers."""


@dataclass
class Model:
    """The fields of `DeepSeekV3Config`, with its defaults: the reference model of 254,896,512 parameters."""

    vocab_size: int | None = None
    """Vocabulary size in tokens; default: the tokenizer's. A larger one leaves rows unused."""
    hidden_size: int = 384
    """Width of the residual stream in channels."""
    intermediate_size: int = 1024
    """Width of one expert in channels."""
    num_hidden_layers: int = 24
    """Number of layers."""
    num_attention_heads: int = 6
    """Query heads per layer."""
    num_key_value_heads: int = 2
    """Key/value heads per layer (gqa); a divisor of the query heads."""
    head_dim: int = 64
    """Channels per head (gqa)."""
    attention: Literal["gqa", "latent"] = "gqa"
    """Grouped-query or multi-head latent attention."""
    q_lora_rank: int | None = None
    """Channels of the query latent (latent); default: queries are not compressed."""
    kv_lora_rank: int = 128
    """Channels of the key/value latent (latent)."""
    qk_nope_head_dim: int = 32
    """Channels per query and key head without rotary embedding (latent)."""
    qk_rope_head_dim: int = 32
    """Channels per query and key head with rotary embedding (latent)."""
    v_head_dim: int = 64
    """Channels per value head (latent)."""
    latent_norm_eps: float | None = None
    """Epsilon of the latents' RMSNorm, above 0; default: rms_norm_eps. Export to DeepSeek-V3's class needs 1e-6."""
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of queries and keys before rotary embedding: per head, or over all heads of a token; default: none."""
    num_experts: int = 8
    """Routed experts per layer."""
    num_experts_per_tok: int = 2
    """Routed experts per token (top-k)."""
    n_shared_experts: int = 0
    """Shared experts per layer, which process every token."""
    first_k_dense_replace: int = 0
    """Number of leading layers with a dense SwiGLU of dense_intermediate_size instead of experts."""
    dense_intermediate_size: int | None = None
    """Width of the dense SwiGLU in channels."""
    num_nextn_predict_layers: int = 0
    """Layers after the last one that predict the token after the next, and so on, in training (multi-token prediction)."""
    n_group: int | None = None
    """Number of expert groups; a token's experts come from its best topk_group groups. Default: no groups."""
    topk_group: int | None = None
    """Groups per token."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns router logits into scores."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Ratio by which the routed experts' output is scaled, above 0."""
    max_position_embeddings: int = 8192
    """Longest context in tokens."""
    rope_theta: float = 100000.0
    """Base of the rotary embedding's wavelengths, above 0."""
    rope_scaling: Yarn | None = None
    """YaRN scaling: factor, original_max_position_embeddings and, optionally, its other settings."""
    rms_norm_eps: float = 1e-5
    """Epsilon of RMSNorm, above 0."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights, 0 or more."""
    tie_word_embeddings: bool = True
    """Share the input and output embedding matrix."""
    eos_token_id: list[int] | None = None
    """Token ids that end generation; default: the tokenizer's end-of-text token."""
    force_uniform_routing: bool = False
    """Route tokens to all experts in turn, ignoring the router; only for `smolds bench` and `benchmarks/`."""

    def architecture(self, tokenizer: Any = None) -> dict[str, Any]:
        """Return the arguments of `DeepSeekV3Config`, with the tokenizer's special tokens if one is passed."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "force_uniform_routing"}
        if tokenizer is not None:
            found["bos_token_id"] = tokenizer.bos_token_id
            found["eos_token_id"] = self.eos_token_id or tokenizer.eos_token_id
        return found


@dataclass
class Source:
    """One source of a mixture."""

    source: str
    """Source, in the form of data.source."""
    weight: float = 1.0
    """Ratio of its tokens to those of the other sources; 0 = only in stages that name it."""
    max_epochs: float | None = None
    """Most passes over the source, in epochs; default: unlimited."""
    text_field: str | None = None
    """Text column; default: data.text_field."""
    split: str | None = None
    """Dataset split; default: data.split."""
    token_dtype: str | None = None
    """Type of token ids; default: data.token_dtype."""


@dataclass
class Data:
    """Corpus, tokenizer and sequence length."""

    source: str = "stdlib"
    """Dataset: stdlib | text:GLOB | jsonl:GLOB | parquet:GLOB | arrow:GLOB | tokens:GLOB | hf:NAME[:CONFIG]."""
    sources: dict[str, Source] | None = None
    """Mixture instead of source: for each name a source, weight, max_epochs, text_field and split."""
    text_field: str = "text"
    """Text column of jsonl, parquet, arrow and hf sources; doc.text is the field text of the field doc."""
    split: str = "train"
    """Dataset split of an hf source."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Type of token ids in flat .bin files of a tokens source."""
    tokenizer: str = "train"
    """Tokenizer: train (byte-level BPE on the corpus), a folder, or a name on the Hub."""
    tokenizer_vocab_size: int = 8192
    """Vocabulary size of a trained tokenizer, in tokens."""
    allow_control_tokens: bool = False
    """Convert text that spells a control token, such as <|endoftext|>, to that token."""
    seq_len: int = 1024
    """Sequence length in tokens."""
    max_tokens: int | None = None
    """Most tokens to read from a source; default: all, for an hf source as many as the run needs."""
    document_mask: bool = False
    """Mask attention across documents, restart positions in each, and predict no document's first token."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Packing of documents into sequences: concatenate and split, or best-fit, which splits only longer documents."""
    val_fraction: float = 0.005
    """Fraction of the documents in the validation set."""
    window_tokens: int = 2**28
    """Shuffle-window size in tokens; files are shuffled too."""
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    """Action on an empty or damaged file, which is always named."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Action on a row that is unreadable or whose text is not a string; skipped rows are listed in bad_rows.jsonl."""
    workers: Literal["auto"] | int = "auto"
    """Tokenizer processes per machine during training; auto = the cores that the ranks leave free, 1 to 16."""
    cache_dir: str = "~/.cache/smolds"
    """Folder of token shards, tokenizers and file lists."""

    @property
    def mixed(self) -> dict[str, Source]:
        """Return the sources sorted by name, with all fields filled in; a single source is named after its kind."""
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
    """Return the sources of a saved `data` section, as `Data.mixed`, without settings of other versions."""
    named = {name: Source(**one) for name, one in (data["sources"] or {}).items()}
    known = {f.name for f in dataclasses.fields(Data)}
    return Data(**{name: value for name, value in data.items() if name in known} | {"sources": named or None}).mixed


@dataclass
class Stage:
    """A part of the run; what it does not set stays as before it."""

    until: float | str | None = None
    """End: a fraction of the steps (0.8), a step (4000) or "1.5T tokens"; default: the end of the run."""
    weights: dict[str, float] | None = None
    """Weight of each source, 0 if not named; default: as before, at first the sources' own weights."""
    seq_len: int | None = None
    """Sequence length in tokens."""
    global_batch: int | None = None
    """Sequences per step over all ranks."""
    micro_batch: int | None = None
    """Sequences per forward pass of one rank."""
    lr: float | None = None
    """Learning rate: throughout (constant), at the beginning (inverse_sqrt) or at the end (warmup, linear, cosine)."""
    lr_shape: Literal["warmup", "constant", "hold", "linear", "cosine", "inverse_sqrt"] | None = None
    """Course of the learning rate from where it is, until a later stage sets another; default: constant if lr is set."""
    lr_until: float | str | None = None
    """End of the shape in steps or tokens, in the forms of until, if later than the next one's begin."""
    rope_theta: float | None = None
    """Base of the rotary embedding's wavelengths, above 0."""
    rope_scaling: Yarn | None = None
    """YaRN scaling, as model.rope_scaling."""
    document_mask: bool | None = None
    """Mask attention across documents, as data.document_mask."""


@dataclass
class Train:
    """Optimization."""

    steps: int = 10_000
    """Number of steps."""
    stages: list[Stage] | None = None
    """Settings that change during the run: a list of until and any of weights, seq_len, global_batch, micro_batch, lr,
    lr_shape, lr_until, rope_theta, rope_scaling and document_mask."""
    time_budget: float | None = None
    """Seconds for all steps; after the warm-up, steps is lowered to what fits. Default: no limit."""
    seed: int = 0
    """Seed of weights and sample order, 0 or more."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward and backward pass; auto = bf16 where the device computes it fast."""
    global_batch: int = 32
    """Sequences per step over all ranks."""
    micro_batch: int | None = None
    """Sequences per forward pass of one rank; the rest is accumulated. Default: by device and seq_len."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate, above 0."""
    mup: bool = False
    """Scale learning rates and initial weights with width and depth (muP), so that lr suits models of all sizes."""
    mup_base_width: int = 384
    """Hidden size in channels to which lr and model.initializer_range refer (mup)."""
    mup_base_depth: int = 24
    """Number of layers to which lr refers (mup)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning-rate schedule, which ends at lr * min_lr_fraction. Cosine depends on steps: to continue a finished run
    without a jump, set wsd, decay_fraction 0 (or the fraction to decay in) and the last learning rate as lr."""
    warmup_steps: int = 100
    """Linear warm-up in steps."""
    decay_fraction: float = 0.2
    """Last fraction of the steps in which wsd decays."""
    min_lr_fraction: float = 0.1
    """Final learning rate as a fraction of lr."""
    weight_decay: float = 0.1
    """Decoupled weight decay, 0 or more; a step multiplies weights by 1 - lr * weight_decay."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment, 0 to 1; momentum of Muon."""
    beta2: float = 0.95
    """Decay rate of Adam's second moment, 0 to 1."""
    ema: float = 0.0
    """Decay of the weights' moving average, for example 0.999: a second set of weights in checkpoints; 0 = off."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    qk_clip: float = 0.0
    """Largest attention logit; above it, a step scales down a head's query and key weights; 0 = off (Kimi K2: 100)."""
    balance: Literal["bias", "aux_loss", "none"] = "bias"
    """Load balancing of experts: selection bias (without an auxiliary loss), auxiliary loss, or none."""
    balance_rate: float = 1e-3
    """Change of a selection bias per step; after the warm-up it decays with the learning rate."""
    aux_loss_coef: float = 0.01
    """Coefficient of the auxiliary loss (balance aux_loss)."""
    sequence_balance_coef: float = 0.0
    """Coefficient of the balance loss within each sequence (1e-4 in DeepSeek-V3, with the bias); 0 = off."""
    z_loss_coef: float = 0.0
    """Coefficient of the routers' z-loss, which keeps logits small (usually 1e-3); 0 = off."""
    mtp_coef: float = 0.3
    """Coefficient of the loss of multi-token prediction (model.num_nextn_predict_layers)."""
    activation_checkpointing: Recomputed = "none"
    """Activations to recompute in the backward pass: attention with its norms; experts, or the dense SwiGLU; all except
    the outputs of matmuls and attention (selective); or full blocks (full)."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the operations between matmuls; auto = for long runs if a compiler is found."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Record each micro batch's passes as CUDA graphs; auto = in one process in bf16 without a document mask."""
    eval_every: int = 500
    """Steps between evaluations; 0 = only at the end."""
    eval_sequences: int = 128
    """Validation sequences per evaluation."""
    nonfinite_limit: int = 10
    """Consecutive steps with a NaN or infinite loss or gradient that stop the run; each of them skips its update."""
    skip_steps: float = 0.0
    """Standard deviations above the last 128 steps from which a loss or gradient norm skips its update, for example 6;
    0 = off."""
    spike_threshold: float = 0.0
    """Standard deviations above recent losses from which a loss counts as a spike, for example 8; 0 = off."""
    spike_steps: int = 3
    """Consecutive spikes that roll the run back to its last checkpoint; samples since then are skipped. In steps."""


def saved_train(train: dict[str, Any]) -> Train:
    """Return a saved `train` section without settings of other versions."""
    known = {f.name for f in dataclasses.fields(Train)}
    found = Train(**{name: value for name, value in train.items() if name in known})
    stages = [Stage(**one) if isinstance(one, dict) else one for one in found.stages or ()]
    for stage in stages:
        if isinstance(stage.rope_scaling, dict):
            stage.rope_scaling = Yarn(**stage.rope_scaling)
    return dataclasses.replace(found, stages=stages or None)


@dataclass
class Parallel:
    """Topology; `parallel.topology` chooses what is "auto"."""

    engine: Literal["auto", "local", "deepspeed"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    expert: Literal["auto", "max"] | int = "auto"
    """Ranks that share one set of experts; auto = the fastest by the planner's estimate, max = most within a node."""
    hardware: str | None = None
    """Planner's specs: a name in costs/hardware.yaml, or a file of smolds plan --calibrate; default: by device."""
    zero: Literal["auto"] | int = "auto"
    """ZeRO stage, 0 to 3."""
    ds_config: str | None = None
    """DeepSpeed JSON file; default: ds_configs/zeroN.json."""
    keep_memory: Literal["auto"] | bool = "auto"
    """Keep freed memory for the next step on Linux CPUs (faster); auto = if a rank needs at most 90 % of the memory."""
    grace: float = 10.0
    """Seconds after a rank's death until the other ranks exit."""
    timeout: float = 600.0
    """Seconds without progress on any rank after which the job counts as hung; 0 = no limit."""
    compare_every: int = 100
    """Steps between comparisons of the ranks' compute time, which report stragglers; 0 = off."""
    check_every: int = 1000
    """Steps between comparisons of replicated weights, also made before each checkpoint; 0 = off."""


@dataclass
class Checkpoint:
    """Checkpoints and resuming."""

    every: int = 1000
    """Steps between checkpoints; 0 = only on a signal."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Keep checkpoints of multiples of this many steps permanently; 0 = off."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    resume: str = "never"
    """Start: never | auto (from this run's last checkpoint, if any) | a step of this run | a checkpoint's folder."""
    background: bool = True
    """Write in the background from a copy in host memory; off = training waits, without a copy."""
    on_error: Literal["continue", "stop"] = "continue"
    """Action if a checkpoint cannot be written; older checkpoints stay complete."""


@dataclass
class Log:
    """Output during training."""

    sample_every: int = 500
    """Steps between samples; 0 = only at the end."""
    sample_prompts: list[str] = field(default_factory=lambda: ["The "])
    """Prompts of the samples."""
    final_prompts: list[str] = field(default_factory=list)
    """More prompts for the samples at the end."""
    sample_tokens: int = 64
    """Length of a sample in tokens."""
    sample_temperature: float = 0.6
    """Sampling temperature, 0 or more; 0 = greedy."""
    statistics_every: int = 0
    """Steps between statistics of weights, gradients, updates, activations and attention logits; 0 = off."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    to: Literal["", "wandb"] = ""
    """Tracker in addition to TensorBoard."""
    every: float = 15.0
    """Seconds between progress lines if there is no terminal."""
    level: Literal["quiet", "normal", "verbose"] = "normal"
    """Output: quiet (-q) = only warnings and errors; verbose (-v) = a line per step, and the full configuration."""


@dataclass
class Eval:
    """lm-evaluation-harness tasks, scored during training (pip install smolds-dist[eval])."""

    tasks: str = ""
    """Task names, comma-separated."""
    every: int = 0
    """Steps between evaluations; 0 = only at the end."""
    include_path: str | None = None
    """Folder with YAML files of your own tasks."""
    num_fewshot: int | None = None
    """Number of examples before each question; default: the task's."""
    limit: int | None = None
    """Questions per task; default: all."""
    batch_size: int = 8
    """Questions per batch of a rank."""

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass
class Profile:
    """Profiling with torch.profiler."""

    steps: str | None = None
    """First and last step to trace, such as 10:13; traces go to the run's profile folder."""


@dataclass
class RunConfig:
    """Settings of a run; those that `load_config` returns have passed `rules.validate`."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    profile: Profile = field(default_factory=Profile)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / str(self.run.name)
