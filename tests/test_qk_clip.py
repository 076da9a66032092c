"""QK-clip: the recorded maximum is the largest logit, and one step reduces it to the limit."""

from types import SimpleNamespace

import pytest
import torch
from test_documents import packed
from test_model import GQA, LATENT, build, tokens

from smolds_dist.config import load_config
from smolds_dist.data.batch import apply_document_mask
from smolds_dist.model.attention import largest_logits
from smolds_dist.model.causal_attention import Documents
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.make_engine import make_engine
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import Machine, plan_topology
from smolds_dist.training.compiling import try_to_compile, undo_compile
from smolds_dist.training.qk_clip import QkClip
from smolds_dist.training.trainer import train

SETTINGS = {"gqa": GQA, "latent": LATENT, "latent without a query rank": LATENT | {"q_lora_rank": None}}


def test_largest_logits_equal_those_of_eager_attention():
    query, key = torch.randn(2, 6, 300, 8), torch.randn(2, 3, 300, 8)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3
    seen = torch.ones(300, 300, dtype=torch.bool).tril()
    expected = scores.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest_logits(query, key, 0.3), expected)
    torch.testing.assert_close(largest_logits(query, key, 0.3, mask=seen[None, None]), expected)
    positions = torch.arange(300).remainder(70).expand(2, -1)  # documents of 70 tokens
    of = torch.arange(300) // 70
    expected = scores.masked_fill(~(seen & (of[:, None] == of)), -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest_logits(query, key, 0.3, documents=Documents(positions)), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_step_reduces_the_largest_logits_of_clipped_heads_to_the_limit(kind, dtype):
    model = build(SETTINGS[kind]).train()
    config = load_config(["--preset", "debug", f"--train.dtype={dtype}", "--parallel.engine=local"])
    machine = Machine(("cpu",), 1, True, 10**10)
    engine = make_engine(model, config, plan_topology(config, machine, RankInfo()))
    clip = QkClip(engine, model.config, 1.0)
    ids = tokens(2, 24)
    seen = []
    for _ in range(2):
        engine.backward(engine.forward(ids, ids))
        largest_LN = clip.take()
        seen.append(largest_LN)
        clip.limit = limit = seen[0][0].median().item()
        # An update too small to change anything
        engine.step(1e-12, results={"logits": largest_LN}, factors=lambda read: clip.factors(read["logits"]))
    before, after = seen
    assert (before[0] > limit).any() and (before[0] < limit).any()
    tolerance = 1e-3 if dtype == "fp32" else 3e-2
    # Only the first layer's input is unchanged.
    torch.testing.assert_close(after[0], before[0].clamp(max=limit), rtol=tolerance, atol=tolerance * limit)
    model.eval()
    model(input_ids=ids)  # not a training pass
    assert clip.take().max() == -torch.inf


def test_largest_logits_stay_within_documents():
    model = build(GQA).train()
    rows = [[3, 50, 20, 47], [100, 20], [120]]
    ids = packed(rows)
    positions, labels = apply_document_mask(ids, 0)
    attention = model.model.layers[0].self_attn
    found = []
    for given in ({"position_ids": positions}, {}):
        attention.largest_logits = torch.full((6,), -torch.inf)
        model(input_ids=ids, labels=labels, use_cache=False, **given)
        found.append(attention.largest_logits)
    assert (found[0] <= found[1] + 1e-6).all() and (found[0] < found[1] - 1e-6).any()


def test_a_run_logs_its_logits_and_clipped_heads(small_run, tmp_path):
    train(load_config([*small_run, "--run.name=clipped", "--train.qk_clip=0.001", "--train.steps=3"]))
    rows = [row for row in read_rows(tmp_path / "runs" / "clipped" / "metrics.jsonl") if "loss" in row]
    assert [row["clipped_heads"] > 0 for row in rows] == [row["max_logit"] > 0.001 for row in rows]
    assert rows[0]["clipped_heads"] == 4 and rows[1]["max_logit"] < rows[0]["max_logit"] / 2


def test_compiled_attention_records_its_logits():
    model = build(GQA).train()
    engine = SimpleNamespace(model=model, device=torch.device("cpu"))
    clip = QkClip(engine, model.config, 1.0)
    ids = tokens(2, 24)
    model(input_ids=ids, labels=ids)
    expected = clip.take()
    topology = SimpleNamespace(micro_batch=2, dtype="fp32", torch_device="cpu", engine="local", zero=0)
    try:
        assert try_to_compile(engine, topology, 24, model.config, "aot_eager") is None
        clip.take()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(block.compiled_attend is not None for block in model.model.layers)
        torch.testing.assert_close(clip.take(), expected)
    finally:
        undo_compile(model)
