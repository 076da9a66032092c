"""What a run can be told, as typed dataclasses. `rules` says which values go together, `config` fills them in."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Recomputed = Literal["none", "attention", "experts", "selective", "full"]


@dataclass
class Run:
    """Where a run lives: `dir`/`name`."""

    name: str | None = None
    """The preset's name where not given."""
    dir: str = "runs"


@dataclass
class Yarn:
    """YaRN's scaling of rotary embedding, for texts longer than the model was first trained on (arXiv 2309.00071)."""

    factor: float
    """How much longer the texts may be."""
    original_max_position_embeddings: int
    """Tokens that the model was first trained on."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    rope_type: Literal["yarn"] = "yarn"
    """As transformers has it."""


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
    latent_norm_eps: float | None = None
    """Of the latents' norms; rms_norm_eps where not given. An export to DeepSeek-V3's class needs 1e-6."""
    qk_norm: Literal["head", "all"] | None = None
    """Norms queries and keys before they are turned: each head by itself, or all heads of a token together."""
    num_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    """Leading layers that have one SwiGLU in place of the mixture, of dense_intermediate_size."""
    dense_intermediate_size: int | None = None
    n_group: int | None = None
    """Groups of experts, of which a token's best topk_group are chosen from; all of them where not given."""
    topk_group: int | None = None
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    max_position_embeddings: int = 8192
    rope_theta: float = 100000.0
    rope_scaling: Yarn | None = None
    """YaRN: factor and original_max_position_embeddings, and if need be its further settings."""
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    eos_token_id: list[int] | None = None
    """Tokens that end a generated text; default: the tokenizer's end-of-text token."""
    force_uniform_routing: bool = False
    """Tokens take turns among the experts, whatever the router says; for `smolds bench` and `benchmarks/` alone."""

    def architecture(self, tokenizer: Any = None) -> dict[str, Any]:
        """Return what `DeepSeekV3Config` takes, with the special tokens of a tokenizer if one is given."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "force_uniform_routing"}
        if tokenizer is not None:
            found["bos_token_id"] = tokenizer.bos_token_id
            found["eos_token_id"] = self.eos_token_id or tokenizer.eos_token_id
        return found


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
    """The sources of a saved `data` section, as `Data.mixed`."""
    named = {name: Source(**one) for name, one in (data["sources"] or {}).items()}
    return Data(**data | {"sources": named or None}).mixed


@dataclass
class Train:
    """The optimisation."""

    steps: int = 10_000
    time_budget: float | None = None
    """Seconds for all steps: at the end of the warm-up, steps is lowered to what fits on this machine; null: none."""
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    global_batch: int = 32
    """Sequences per step, the same in every topology."""
    micro_batch: int | None = None
    """Sequences per forward pass of one rank; the rest is accumulated."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Both end at lr * min_lr_fraction. Cosine depends on steps: to continue a finished run without a jump of the rate, give
    wsd, decay_fraction 0 (or the share to decay in) and the last rate as lr."""
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
    qk_clip: float = 0.0
    """Largest attention logit, beyond which a step shrinks what a head's queries and keys are made with, 100 in Kimi K2 with
    Muon; 0: none."""
    balance: Literal["bias", "aux_loss", "none"] = "bias"
    balance_rate: float = 1e-3
    """Change of a selection bias per step; after the warm-up it falls with the learning rate."""
    aux_loss_coef: float = 0.01
    """Where balance is aux_loss."""
    sequence_balance_coef: float = 0.0
    """Of the balance loss within each sequence, which DeepSeek-V3 has beside the bias, 1e-4 there; 0: none."""
    z_loss_coef: float = 0.0
    """Of the routers' z-loss, which keeps their logits small, usually 1e-3; 0: none."""
    activation_checkpointing: Recomputed = "none"
    """What the backward pass computes again instead of keeping it: attention with its norms; experts, or what a block has in
    their place; all but the results of products and attention (selective); or whole blocks (full)."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile for what runs between matrix products; auto: where a compiler is found and the run is long."""
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
    expert: Literal["auto", "max"] | int = "auto"
    """Ranks that share one set of experts; auto: as many as make the fastest step, by the planner's formulas; max: as many
    as a node takes."""
    hardware: str | None = None
    """What the formulas take for this machine: a name of costs/hardware.yaml, or a file of smolds plan --calibrate. Where
    not given, GPUs are known by their names, and CPUs have typical figures."""
    zero: Literal["auto"] | int = "auto"
    """ZeRO stage, 0 to 3."""
    ds_config: str | None = None
    """Your own DeepSpeed JSON instead of ds_configs/zeroN.json."""
    keep_memory: Literal["auto"] | bool = "auto"
    """On Linux CPUs, keep what a step frees for the next one, which makes it faster; auto: unless a rank needs more than
    90 % of the memory."""
    grace: float = 10.0
    """Seconds after a rank's death until the others leave by force."""
    timeout: float = 600.0
    """Seconds without any forward pass after which the ranks count as hanging; 0: wait for ever."""
    compare_every: int = 100
    """Steps between comparisons of how long the ranks compute, which name a slow one; 0: none."""
    check_every: int = 1000
    """Steps between comparisons of the weights that several ranks hold, also before each checkpoint; 0: none."""


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


TRACKERS = ("wandb", "mlflow", "trackio")


@dataclass
class Log:
    """What is written while training."""

    sample_every: int = 500
    """Steps; 0: only at the end."""
    sample_prompts: list[str] = field(default_factory=lambda: ["The "])
    final_prompts: list[str] = field(default_factory=list)
    """Sampled too at the end of the run."""
    sample_tokens: int = 64
    sample_temperature: float = 0.6
    """0: always the likeliest token."""
    tensorboard: bool = True
    to: str = ""
    """Trackers beside TensorBoard, with commas between: wandb, mlflow, trackio."""
    every: float = 15.0
    """Seconds between two lines of progress, where there is no terminal to redraw one."""
    level: Literal["quiet", "normal", "verbose"] = "normal"
    """Quiet (-q): only warnings and errors; verbose (-v): a line for every step, and the whole configuration."""


@dataclass
class Eval:
    """lm-evaluation-harness's tasks, scored while training (pip install smolds-dist[eval])."""

    tasks: str = ""
    """Their names, with commas between."""
    every: int = 0
    """Steps; 0: only at the end."""
    include_path: str | None = None
    """A folder with YAML files of tasks of your own."""
    num_fewshot: int | None = None
    """Examples before each question; the task's own number where not given."""
    limit: int | None = None
    """Questions of each task; all where not given."""
    batch_size: int = 8
    """Questions that a rank computes together."""

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass
class Profile:
    """Tracing of what every operation takes."""

    steps: str | None = None
    """FIRST:LAST, both traced, such as 10:13; the trace is written to the run's profile folder."""


@dataclass
class RunConfig:
    """One run. `rules.validate` has been called on every RunConfig that `load_config` returns."""

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
