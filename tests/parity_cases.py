"""Cases of test_parity.py, and layout changes between them. LONG ones run only with --all."""

from pathlib import Path
from typing import NamedTuple

import pytest

LATENT = ("--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1")
# Features of published models: dense layers, shared experts, untied embeddings, YaRN, groups, QK norm; and router losses.
FAMILY = (
    "--model.num_hidden_layers=3", "--model.first_k_dense_replace=1", "--model.dense_intermediate_size=40",
    "--model.n_shared_experts=1", "--model.tie_word_embeddings=false", "--train.sequence_balance_coef=0.05",
    "--train.z_loss_coef=0.01", "--train.seed=4", "--train.lr=0.003",
    '--model.rope_scaling={"factor": 4, "original_max_position_embeddings": 16}',
)  # fmt: skip
MODELS = {
    "latent": LATENT,
    "deepseek": (*LATENT, *FAMILY, "--model.n_group=4", "--model.topk_group=2", "--model.latent_norm_eps=1e-6"),
    "qwen3": (*FAMILY, "--model.qk_norm=head"),
    "olmoe": (*FAMILY, "--model.qk_norm=all", "--model.norm_topk_prob=false"),
    # Computed per micro batch, which has the same two sequences in every layout here.
    "aux_loss": ("--train.balance=aux_loss", "--train.aux_loss_coef=0.05"),
    "clip": ("--train.qk_clip=0.5",),  # low enough to clip heads in every step
    "muon": ("--train.optimizer=muon",),
    "ema": ("--train.ema=0.7",),
    "mup": ("--train.mup=true", "--train.mup_base_width=16", "--train.mup_base_depth=1"),
    "mtp": ("--model.num_nextn_predict_layers=2", "--train.mtp_coef=0.5"),
    "bf16": ("--train.dtype=bf16",),
    "every": ("--model.num_experts_per_tok=8",),  # expert for each token, so that rounding cannot change the selection
}
# Options that must not change results.
LAYOUTS = {
    **{what: (f"--train.activation_checkpointing={what}",) for what in ("full", "selective", "attention", "experts")},
    # Buckets are smaller than a weight matrix: gradients are reduced in many pieces, most of them without DeepSpeed's
    # buffers. ZeRO 3 also has many optimizer sub-steps.
    "small_buckets": (f"--parallel.ds_config={Path(__file__).with_name('small_buckets.json')}",),
    "offload": (f"--parallel.ds_config={Path(__file__).with_name('offload.json')}",),
    # The branches of AutoEP's own experts: its loop, and grouped matmuls with fused gate and up projections, as on GPUs.
    "loop": (),
    "grouped": (f"--parallel.ds_config={Path(__file__).with_name('grouped.json')}",),
    "disturbed": (),  # evaluation before every step, sampling after it
}


class Case(NamedTuple):
    """A model and a layout, by names of MODELS and LAYOUTS."""

    world: int  # ranks; 0 is one process in plain PyTorch
    expert: int
    zero: int
    names: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        layout = [f"--parallel.expert={self.expert}", f"--parallel.zero={self.zero}", "--parallel.engine=deepspeed"]
        return [*(layout if self.world else ()), *(o for name in self.names for o in (MODELS | LAYOUTS)[name])]

    @property
    def disturb(self) -> bool:
        return "disturbed" in self.names

    @property
    def autoep(self) -> bool:
        return "loop" in self.names

    @property
    def reference(self) -> "Case":
        """Same model in one process."""
        return Case(0, 0, 0, tuple(name for name in self.names if name in MODELS))

    def __str__(self) -> str:
        return "-".join([f"w{self.world}e{self.expert}z{self.zero}" if self.world else "local", *self.names])


def ranks(world: int, expert: int, zero: int, *names: str) -> Case:
    return Case(world, expert, zero, names)


def local(*names: str) -> Case:
    return Case(0, 0, 0, names)


# Every model, ZeRO stage, optimizer and kind of activation checkpointing, each with several of the others.
CASES = [
    ranks(2, 1, 0), ranks(2, 2, 1, "full", "disturbed"), ranks(2, 1, 2), ranks(2, 2, 3, "selective"),
    ranks(2, 2, 0, "deepseek"), ranks(2, 1, 1, "deepseek"), ranks(2, 2, 2, "deepseek"), ranks(2, 1, 3, "deepseek"),
    ranks(2, 2, 3, "deepseek", "full", "disturbed"), ranks(2, 2, 3, "qwen3", "attention"),
    ranks(2, 2, 3, "olmoe", "experts"), ranks(2, 2, 1, "aux_loss", "selective"),
    ranks(2, 2, 0, "clip"), ranks(2, 2, 3, "clip"), ranks(2, 2, 2, "clip", "muon"), ranks(2, 2, 1, "latent", "clip"),
    ranks(2, 1, 0, "muon"), ranks(2, 1, 3, "muon"), ranks(2, 2, 3, "muon"), ranks(2, 2, 1, "deepseek", "muon"),
    ranks(2, 2, 1, "small_buckets"), ranks(2, 2, 3, "small_buckets"), ranks(2, 2, 1, "offload"), ranks(2, 2, 3, "offload"),
    ranks(2, 2, 0, "bf16", "every"), ranks(2, 2, 2, "bf16", "every"), ranks(2, 2, 1, "muon", "bf16"),
    ranks(2, 2, 3, "muon", "bf16"),
    ranks(2, 2, 1, "ema", "clip"), ranks(2, 1, 2, "ema", "muon"), ranks(4, 2, 3, "ema"),
    ranks(2, 2, 1, "mup", "grouped"), ranks(2, 2, 3, "mup", "muon"),
    ranks(2, 2, 0, "grouped"), ranks(2, 1, 1, "grouped", "full"), ranks(2, 2, 2, "deepseek", "grouped"),
    ranks(2, 2, 3, "grouped"), ranks(2, 2, 3, "muon", "grouped"), ranks(2, 2, 1, "bf16", "every", "grouped"),
    ranks(2, 2, 1, "loop"),
    ranks(2, 1, 0, "mtp"), ranks(2, 2, 3, "mtp", "full", "disturbed"), ranks(2, 2, 1, "deepseek", "mtp"),
    ranks(4, 2, 1), ranks(4, 4, 2, "deepseek"), ranks(4, 2, 0, "muon"), ranks(4, 2, 3, "muon"),
    ranks(1, 1, 1),
]  # fmt: skip
LONG_CASES = [
    *(ranks(2, expert, zero, *names) for names in ((), ("deepseek",)) for expert in (1, 2) for zero in range(4)),
    *(ranks(2, 2, zero, "muon") for zero in range(4)), ranks(2, 1, 1, "muon"),
    *(ranks(2, 2, zero, "bf16") for zero in range(4)), *(ranks(2, 2, zero, "muon", "bf16") for zero in (0, 1, 3)),
    ranks(2, 2, 3, "latent", "full", "disturbed"), ranks(2, 2, 3, "attention"), ranks(2, 2, 3, "experts"),
    ranks(2, 2, 1, "selective"), ranks(2, 2, 1, "clip"), ranks(2, 2, 2, "offload"), ranks(2, 2, 1, "qwen3"),
    ranks(2, 2, 3, "olmoe"), ranks(2, 2, 1, "aux_loss"),
    *(ranks(2, 2, zero, "loop") for zero in (0, 2)), ranks(2, 2, 3, "deepseek", "loop"), ranks(2, 1, 3, "grouped"),
    ranks(2, 2, 3, "bf16", "every", "grouped"), ranks(2, 2, 0, "muon", "grouped"),
    *(ranks(2, expert, zero, "deepseek", "mtp") for expert in (1, 2) for zero in range(4)),
    ranks(4, 4, 2), ranks(4, 2, 1, "muon"), ranks(4, 2, 1, "deepseek"),
    *(ranks(2, 2, zero, "ema") for zero in range(4)), ranks(2, 2, 3, "offload", "ema"),
    ranks(2, 2, 1, "ema", "bf16", "every"), ranks(2, 1, 0, "ema", "bf16", "every"),
    ranks(2, 1, 0, "mup", "muon"), ranks(2, 1, 2, "mup"), ranks(2, 1, 2, "mtp", "muon"), ranks(4, 2, 3, "mtp"),
]  # fmt: skip
# (source, target) of a resume.
CHANGES = [
    (local(), ranks(4, 2, 1)),
    (ranks(2, 1, 0), local()),
    (ranks(2, 2, 3, "selective"), ranks(2, 1, 2)),
    (ranks(2, 1, 2), ranks(2, 2, 3, "selective")),
    (ranks(4, 2, 1), ranks(2, 1, 0)),
    (ranks(2, 2, 1, "full", "disturbed"), ranks(1, 1, 1)),
    (ranks(2, 1, 3, "deepseek"), ranks(4, 4, 2, "deepseek")),
    (local("deepseek"), ranks(2, 2, 0, "deepseek")),
    (ranks(4, 2, 3, "muon"), ranks(2, 1, 0, "muon")),
    (ranks(2, 1, 0, "muon"), ranks(4, 2, 3, "muon")),
    (ranks(2, 2, 3, "muon"), local("muon")),
    (ranks(2, 2, 1, "offload"), ranks(2, 2, 3, "offload")),
    (ranks(2, 2, 3, "grouped"), ranks(2, 1, 0)),
    (ranks(4, 2, 3, "ema"), local("ema")),
    (ranks(2, 2, 3, "mup", "muon"), local("mup", "muon")),
    (ranks(2, 1, 0), ranks(2, 2, 0, "grouped")),
    (ranks(2, 2, 3, "mtp", "full", "disturbed"), local("mtp")),
    (local("deepseek", "mtp"), ranks(2, 2, 1, "deepseek", "mtp")),
]
LONG_CHANGES = [
    (local(), ranks(2, 2, 3)),
    (ranks(2, 2, 3), local()),
    (ranks(4, 4, 2), local()),
    (ranks(1, 1, 1), ranks(2, 1, 3)),
    (ranks(2, 2, 0), ranks(2, 2, 1)),
    (ranks(4, 2, 1), ranks(2, 2, 0)),
    (ranks(2, 1, 3), ranks(4, 4, 2)),
    (ranks(2, 2, 3, "offload"), local()),
    (local(), ranks(2, 2, 2, "offload")),
    (local("muon"), ranks(2, 2, 0, "muon")),
    (ranks(2, 2, 0, "muon"), ranks(4, 2, 3, "muon")),
    (ranks(4, 2, 1, "muon"), ranks(2, 1, 3, "muon")),
    (ranks(2, 2, 3, "muon"), ranks(2, 2, 1, "muon")),
    (ranks(2, 2, 2, "muon"), local("muon")),
    (local("deepseek"), ranks(2, 2, 3, "deepseek")),
    *((ranks(2, 2, zero, "ema"), ranks(2, 2, (zero + 1) % 4, "ema")) for zero in range(4)),
    (ranks(2, 2, 3, "deepseek"), ranks(4, 4, 2, "deepseek")),
    (local("ema"), ranks(4, 2, 3, "ema")),
    (ranks(2, 1, 0, "mtp"), ranks(4, 2, 3, "mtp")),
]
# Layouts in which a resumed run equals the uninterrupted one bit for bit.
SAME = [
    local(), ranks(2, 2, 1, "full", "disturbed"), ranks(2, 2, 3, "selective"),
    ranks(2, 2, 0, "bf16", "every"), ranks(2, 2, 3, "muon", "bf16"), ranks(2, 2, 3, "offload"), ranks(4, 2, 1),
]  # fmt: skip
LONG_SAME = [
    ranks(4, 2, 3, "ema"),
    local("bf16"), *(ranks(2, 2, zero) for zero in range(4)), *(ranks(2, 2, zero, "bf16") for zero in (1, 2, 3)),
    ranks(2, 2, 3, "latent", "full", "disturbed"), ranks(2, 2, 1, "muon"),
]  # fmt: skip
# The last rank's loss in step SAVE_AT.
POISONED = [
    (local("ema"), "nan"), (ranks(2, 2, 0), "nan"), (ranks(2, 2, 3), "inf"),
    (ranks(2, 2, 1, "bf16", "every"), "inf"), (ranks(2, 2, 2, "bf16", "every"), "nan"),
    (local("ema"), "1000"), (ranks(2, 2, 0), "1000"), (ranks(2, 2, 1, "ema"), "1000"), (ranks(2, 2, 3, "muon"), "1000"),
]  # fmt: skip
LONG_POISONED = [
    (ranks(4, 2, 3, "ema"), "nan"),
    (local("bf16", "every"), "inf"), (ranks(2, 2, 1), "inf"), (ranks(2, 2, 2), "nan"),
    (ranks(2, 2, 0, "bf16", "every"), "nan"), (ranks(2, 2, 3, "bf16", "every"), "inf"), (local("clip"), "1000"),
    *((ranks(2, 2, zero, "bf16", "every"), "1000") for zero in (0, 2)), (ranks(2, 2, 0, "clip"), "1000"),
    *((ranks(2, 2, zero, "offload"), "1000") for zero in (1, 3)), (ranks(2, 1, 2), "1000"), (ranks(4, 2, 3), "1000"),
]  # fmt: skip


def with_long(short: list, long: list) -> list:
    """Return arguments for `parametrize`: cases, or tuples of several arguments. Those only in `long` are marked long."""
    alone = [(one,) if isinstance(one, Case) else one for one in long if one not in short]
    return [*short, *(pytest.param(*arguments, marks=pytest.mark.long) for arguments in alone)]
