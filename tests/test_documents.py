"""Documents that share a sequence are masked from each other: each has the loss and gradient that it has alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import smolds
from test_model import GQA, LATENT, build

from smolds_dist.config import load_config
from smolds_dist.data.batch import apply_document_mask
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.data.prepare import prepare_data
from smolds_dist.errors import ConfigError
from smolds_dist.inference.evaluate import mean_loss
from smolds_dist.model import empty_model, enable_activation_checkpointing
from smolds_dist.model.attention import eager_attention
from smolds_dist.model.causal_attention import Documents, causal_attention
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.fragments import fill_parameters
from smolds_dist.settings import Data, RunConfig, Train
from smolds_dist.stages import resolve_stages
from smolds_dist.training.initial_values import InitialValues
from smolds_dist.training.trainer import train

EOS = 0


def packed(lengths: list[list[int]], vocab: int = 64) -> torch.Tensor:
    """Return sequences [B, S] of documents of these lengths, each with an end-of-text token but the last, truncated one."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in lengths:
        ids = torch.randint(1, vocab, (sum(row),), generator=generator)
        ids[torch.tensor(row).cumsum(0)[:-1] - 1] = EOS
        rows.append(ids)
    return torch.stack(rows)


# Blocks of queries have 64 rows in fp32 and 128 in bf16: documents within one, over several, and of one token.
LENGTHS = [[1, 5, 100, 30, 60, 104], [299, 1], [64, 64, 64, 64, 44], [300]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_equals_that_of_a_mask(dtype, tolerance, groups):
    torch.manual_seed(0)
    ids = packed([[*row[:-1], 300 - sum(row[:-1])] for row in LENGTHS])
    positions, _ = apply_document_mask(ids, EOS)
    document = (positions == 0).cumsum(1)
    mask = (document[:, :, None] == document[:, None]).tril()[:, None]
    shapes = [(4, 6, 300, 16), (4, groups, 300, 16), (4, groups, 300, 24)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = eager_attention(*exact, mask, 0.3)[0].transpose(1, 2)
    actual = causal_attention(*inputs, 0.3, Documents(positions))
    seed = torch.randn_like(expected)
    got = [actual, *torch.autograd.grad(actual, inputs, seed.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, seed)]
    for ours, reference in zip(got, wanted, strict=True):
        assert (ours - reference).norm() <= tolerance * reference.norm() + 1e-5


def test_blocks_skip_keys_before_their_documents():
    positions, _ = apply_document_mask(packed([[32] * 8, [32] * 8]), EOS)
    assert [(keys.start, keys.stop) for _, keys, _ in Documents(positions).blocks(torch.float32)] == [
        (0, 64), (64, 128), (128, 192), (192, 256),
    ]  # fmt: skip


def test_positions_and_labels_restart_per_document():
    ids = torch.tensor([[5, EOS, 6, 7, EOS, EOS, 8], [5, 6, 7, 8, 9, 5, EOS]])
    positions, labels = apply_document_mask(ids, EOS)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert labels.tolist() == [[5, EOS, -100, 7, EOS, -100, -100], [5, 6, 7, 8, 9, 5, EOS]]


def test_batches_have_the_bounds_of_documents_and_the_number_of_labels():
    ids = packed([[3, 50, 20, 47], [120], [120], [120], [60, 60], [119, 1]])
    config = RunConfig(data=Data(document_mask=True), train=Train(global_batch=6))
    data = SimpleNamespace(
        wait_for_samples=lambda samples: None, batch=lambda indices: ids[indices], stages=resolve_stages(config),
        tokenizer=SimpleNamespace(eos_token_id=EOS),
    )  # fmt: skip
    ahead = BatchPrefetcher(data, (0, 1), [2])
    batch = ahead.take(1)
    ahead.close()
    first, second, third = batch.micro_batches
    assert first.bounds.tolist() == [0, 3, 53, 73, 120, 240] and first.bounds.dtype == torch.int32
    assert second.positions is None and second.bounds is None  # one document per sequence
    assert third.bounds.tolist() == [0, 60, 120, 239, 240]
    positions, labels = apply_document_mask(ids, EOS)
    for part, expected in ((first, slice(0, 2)), (third, slice(4, 6))):
        assert torch.equal(part.positions, positions[expected]) and torch.equal(part.labels, labels[expected])
        assert torch.equal(part.bounds, Documents(part.positions).bounds)
    assert batch.num_labels == 6 * 119 - 5


SETTINGS = {"gqa": GQA, "latent": LATENT}


@pytest.mark.parametrize("recomputed", ["none", "attention", "selective", "full"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", SETTINGS)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(attention, implementation, recomputed):
    model = build(SETTINGS[attention]).train()
    model.config._attn_implementation = implementation
    enable_activation_checkpointing(model, recomputed)
    rows = [[3, 50, 20, 47], [100, 20], [120]]
    ids = packed(rows)
    positions, labels = apply_document_mask(ids, EOS)
    count = (labels[:, 1:] >= 0).sum()
    loss = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss * count
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    alone = torch.zeros(())
    for row, lengths in zip(ids, rows, strict=True):
        for document in row.split(lengths):
            if len(document) > 1:
                alone = alone + model(input_ids=document[None], labels=document[None], use_cache=False).loss * (
                    len(document) - 1
                )
    expected = torch.autograd.grad(alone, list(model.parameters()))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-5
    bounds = Documents(positions).bounds
    given = model(input_ids=ids, labels=labels, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).loss
    assert given.item() == (loss / count).item()
    together = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert together.item() != pytest.approx((loss / count).item(), rel=1e-4)


@pytest.mark.parametrize("attention", SETTINGS)
def test_a_later_token_changes_no_earlier_logit(attention):
    """With and without a cache."""
    model = build(SETTINGS[attention]).eval()
    ids = packed([[90]])
    other = ids.clone()
    other[0, 60:] = ids[0, 60:].flip(0) % 63 + 1
    with torch.no_grad():
        one, two = (model(input_ids=x, use_cache=False).logits for x in (ids, other))
        torch.testing.assert_close(one[:, :60], two[:, :60], atol=1e-5, rtol=1e-5)
        assert ((one - two)[:, 60:].abs().amax(-1) > 1e-3).all()
        step = model(input_ids=ids[:, :40], use_cache=True)
        cache = step.past_key_values if "past_key_values" in step else step.cache
        later = model(input_ids=ids[:, 40:60], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(torch.cat((step.logits, later.logits), 1), one[:, :60], atol=1e-5, rtol=1e-4)


@pytest.fixture
def short_documents(small_run, tmp_path):
    """Options of a small run on documents of a few tokens, masked from each other."""
    chance = np.random.RandomState(0)
    rows = (" ".join(chance.choice("one two three four five".split(), chance.randint(2, 20))) for _ in range(500))
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    given = [*small_run, f"--data.source=jsonl:{tmp_path}/short.jsonl", f"--data.cache_dir={tmp_path}/cache"]
    return [*given, "--data.document_mask=true", "--log.tensorboard=false"]


def test_every_topology_trains_the_same(short_documents, tmp_path):
    options = [*short_documents, "--parallel.device=cpu", "--train.dtype=fp32", "--train.seed=2"]
    options += ["--log.sample_every=0", "--data.seq_len=64"]
    train(load_config([*options, "--run.name=one", "--train.micro_batch=8"]))
    pair = smolds("launch", "--nproc-per-node=2", "--", *options, "--run.name=two", "--train.micro_batch=1")
    assert pair.returncode == 0, pair.text
    one, two = (read_rows(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "val_loss"):
        losses = [[row[key] for row in rows if key in row] for rows in (one, two)]
        assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    train(load_config([*options, "--run.name=whole", "--data.document_mask=false"]))
    whole = [row["loss"] for row in read_rows(tmp_path / "runs" / "whole" / "metrics.jsonl") if "loss" in row]
    assert whole[0] != pytest.approx(next(row["loss"] for row in one if "loss" in row), rel=1e-6)
    found = smolds("eval", str(tmp_path / "runs" / "one"), "--max-tokens", "2000")
    assert found.returncode == 0, found.text


def first_model(config, data):
    """Return a run's initial model."""
    from smolds_dist.training.build import make_model_config

    model = empty_model(make_model_config(config, data))
    fill_parameters(model, InitialValues(config.train.seed, model.config.initializer_range).fill)
    return model


def test_first_loss_is_that_of_the_documents_alone(short_documents, tmp_path):
    """A step's loss in metrics.jsonl is the mean over all labels of the batch, however they are split into micro batches."""
    options = [*short_documents, "--parallel.device=cpu", "--train.dtype=fp32", "--train.steps=1"]
    config = load_config([*options, "--run.name=one"])
    train(config)
    first = next(row["loss"] for row in read_rows(tmp_path / "runs" / "one" / "metrics.jsonl") if "loss" in row)
    data = prepare_data(config)
    model = first_model(config, data)
    ids = data.batch(range(config.train.global_batch))
    eos = data.tokenizer.eos_token_id
    loss, counted = mean_loss(model, ids.flatten().numpy(), config.data.seq_len, len(ids), eos)
    starts = int((ids[:, :-1] == eos).sum())
    assert starts and counted == ids[:, 1:].numel() - starts
    assert first == pytest.approx(loss, rel=1e-5)
    assert np.isfinite(first)


def test_packed_documents_train_as_each_alone(short_documents, tmp_path):
    """No document is split, padding is not predicted, and the first loss is the mean over all documents' labels."""
    options = [*short_documents, "--data.packing=best_fit", "--data.seq_len=64", "--train.steps=2"]
    config = load_config([*options, "--parallel.device=cpu", "--train.dtype=fp32", "--run.name=packed"])
    train(config)
    first = next(row["loss"] for row in read_rows(tmp_path / "runs" / "packed" / "metrics.jsonl") if "loss" in row)
    data = prepare_data(config)
    model = first_model(config, data)
    samples = data.samples(np.arange(config.train.global_batch))
    total = count = 0
    padding = False
    for sample in samples:
        padding |= sum(span.length for span in sample.spans) < 64
        for shard, start, length in sample.spans:
            ids = torch.from_numpy(sample.source.tokens(shard)[start : start + length].astype(np.int64))[None]
            assert ids[0, -1] == data.tokenizer.eos_token_id or length == 64
            if length > 1:
                total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (length - 1)
                count += length - 1
    assert padding and first == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ConfigError, match="set both"):
        load_config([*options, "--data.document_mask=false"])
    told = [
        json.loads(smolds("data", "stats", "--json", "--", *options, f"--data.packing={packing}").stdout)
        for packing in ("concat", "best_fit")
    ]
    assert (
        told[0]["cut_documents"] > 0.1 > told[1]["cut_documents"] and told[0]["padding"] == 0 < told[1]["padding"] < 0.2
    )
