"""`smolds bench launches`: what a step of the reference model asks of a GPU stays as recorded."""

import json

import pytest
import torch
from ranks import ROOT

from smolds_dist.bench import launches
from smolds_dist.parallel.topology import has_compiler

RECORDED = json.loads((ROOT / "benchmarks" / "results" / "launches_255m.json").read_text())
needs_inductor = pytest.mark.skipif(not has_compiler("cpu"), reason="Inductor needs a C++ compiler")
same_torch = pytest.mark.skipif(
    torch.__version__ != RECORDED["torch"], reason=f"the record is of torch {RECORDED['torch']}"
)


def counted(*options: str, sequences: int = 2) -> dict:
    stepper, config = launches.make_stepper("smollm2-deepseek-255m", list(options), sequences)
    counts = launches.count_step(stepper)
    return launches.summarize(counts, launches.planned_kernels(stepper, (sequences, config.data.seq_len)))


@needs_inductor
@same_torch
def test_reference_model_needs_what_is_recorded():
    """Two short sequences need what 16 x 1,024 tokens do, but for the chunks of the loss."""
    found = counted("--data.seq_len=64")
    assert found["waits"] == RECORDED["waits"]
    assert found["regions"]["block"] == tuple(RECORDED["regions"]["block"])
    for part in set(launches.ALL_PARTS) - {"loss", "optimizer"}:
        assert found["uncompiled"][part] == RECORDED["uncompiled"][part], part
    # Clipping, which depends on the gradients, takes five.
    assert abs(found["uncompiled"]["optimizer"] - RECORDED["uncompiled"]["optimizer"]) in (0, 5)
    assert RECORDED["compiled_total"] < 1600 and not any("micro batch" in where for where in RECORDED["waits"])


@pytest.mark.parametrize(
    "options",
    [
        ["--model.attention=latent", "--model.n_shared_experts=1", "--model.scoring_func=sigmoid"],
        ["--model.first_k_dense_replace=1", "--model.dense_intermediate_size=32", "--train.optimizer=muon"],
        ["--train.activation_checkpointing=full", "--train.qk_clip=1", "--train.balance=aux_loss"],
    ],
)
def test_no_micro_batch_waits(options):
    stepper, _ = launches.make_stepper(
        "smollm2-deepseek-255m", ["--data.seq_len=64", "--model.num_hidden_layers=2", *options], 2
    )
    counts = launches.count_step(stepper)
    assert "step: cpu in read_together" in counts.waits
    assert not any("micro batch" in where for where in counts.waits)
    assert counts.captured > 0.7 * (sum(counts.operators.values()) - counts.operators["optimizer"])


def test_a_wait_is_named(monkeypatch):
    from smolds_dist.model.moe import DeepSeekMoE

    record = DeepSeekMoE.record

    def slow_record(self, counts_E, logits_TE):
        counts_E.max().item()
        record(self, counts_E, logits_TE)

    monkeypatch.setattr(DeepSeekMoE, "record", slow_record)
    stepper, _ = launches.make_stepper("smollm2-deepseek-255m", ["--data.seq_len=32", "--model.num_hidden_layers=2"], 2)
    waits = launches.count_step(stepper).waits
    assert waits["micro batch: item in test_a_wait_is_named.<locals>.slow_record"] == 2
