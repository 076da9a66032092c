"""Validation loss.

Shape letters: L layers, E experts.
"""

import math

import torch

from smolds_dist.data.batch import TrainingData, apply_document_mask, document_separator, evaluation_batch
from smolds_dist.data.validation import ValidationSet
from smolds_dist.model.regions import eager_regions
from smolds_dist.parallel.balancer import max_violation, moe_layers
from smolds_dist.parallel.engine import Engine, model_inputs
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig
from smolds_dist.stages import StageSpan


def evaluate(
    config: RunConfig, topology: Topology, engine: Engine, data: TrainingData, stage: StageSpan | None = None
) -> dict[str, float]:
    """Return the mean loss over the first `train.eval_sequences` validation sequences of each source. Collective.

    It is the same in every topology. A stage with another sequence length splits the same text into its own.

    Args:
        stage: of the run; default: the first.

    Returns:
        `val_loss` in nats per token; `val_bits_per_byte` of the text, which is comparable between tokenizers; and
        `val_max_vio`, the mean over layers of the global MaxVio, counted over all sequences (arXiv 2408.15664, section 4.1).
        With several sources also each one's own (`val_loss/web`); the first two are then means weighted by the sources'
        proportions of the run.
    """
    result = {"val_loss": 0.0, "val_bits_per_byte": 0.0}
    counts_LE = torch.zeros(())
    stage = stage or data.stages.spans[0]
    tokens = config.train.eval_sequences * config.data.seq_len
    end_of_text = document_separator(stage.config.data, data.tokenizer)
    for name, weight in data.val_weights.items():
        text = data.sources[name].validation
        loss, of_source_LE = evaluate_source(text, tokens, stage.seq_len, topology, engine, end_of_text)
        bits = loss / math.log(2) / (text.bytes / len(text.tokens))
        result["val_loss"] += weight * loss
        result["val_bits_per_byte"] += weight * bits
        if len(data.sources) > 1:
            result |= {f"val_loss/{name}": loss, f"val_bits_per_byte/{name}": bits}
        counts_LE = counts_LE + of_source_LE
    evaluated = counts_LE.any(-1)  # not layers of multi-token prediction
    return result | {"val_max_vio": round(max_violation(counts_LE[evaluated]).mean().item(), 5)}


@torch.no_grad()
@eager_regions()
def evaluate_source(
    text: ValidationSet, tokens: int, seq_len: int, topology: Topology, engine: Engine, end_of_text: int | None
) -> tuple[float, torch.Tensor]:
    """Return the mean loss in nats per token, and the routed tokens per expert [L, E] of all ranks. Collective.

    Args:
        tokens: most tokens of the text.
        end_of_text: token after which another document begins, if documents are masked from each other.
    """
    num_sequences = max(1, min(tokens, len(text.tokens)) // seq_len)
    at_once = topology.world_size * topology.micro_batch
    total = torch.zeros(2, dtype=torch.float64 if topology.device == "cpu" else torch.float32)
    layers = moe_layers(engine.model).values()
    counts_LE = torch.zeros(len(layers), len(next(iter(layers)).tokens_per_expert))
    engine.model.eval()
    for start in range(0, num_sequences, at_once):
        first = start + topology.rank * topology.micro_batch
        ids, labels = evaluation_batch(text.tokens, seq_len, range(first, first + topology.micro_batch), num_sequences)
        positions = None
        if end_of_text is not None:
            positions, separated = apply_document_mask(ids, end_of_text)
            labels = labels.masked_fill(separated < 0, -100)
        for layer in layers:
            layer.tokens_per_expert.zero_()
        loss = engine.model(**model_inputs(engine.device, ids, labels, positions)).loss
        num_labels = (labels[:, 1:] >= 0).sum()
        total += torch.stack((loss.cpu() * num_labels, num_labels))
        if start + at_once <= num_sequences or not counts_LE.any():  # the last batch may be padded
            counts_LE += torch.stack([layer.tokens_per_expert.float().cpu() for layer in layers])
    engine.model.train()
    loss_sum, num_labels = engine.sum_over_ranks(total).tolist()
    return loss_sum / num_labels, engine.sum_over_ranks(counts_LE).cpu()
