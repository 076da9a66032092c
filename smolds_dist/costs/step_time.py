"""How long a training step takes, and a whole run: closed formulas over a model, a layout and a machine.

Every cause of time is one function, whose docstring has its formula and where it is from. What they leave out: input, the
host's jitter, and congestion of a shared fabric. Seconds and bytes are of one rank throughout.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from smolds_dist.costs.flops import (
    attention_flops,
    attention_weights,
    layers_of,
    orthogonalization_flops,
    product_weights,
)
from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.layout import Layout, load_stretch
from smolds_dist.costs.memory import parameter_counts, rank_parameters, saved_elements

# Of a link's bandwidth that collectives reach; NCCL's own tests show 70 to 85 %.
LINK_SHARE = 0.75
# Of a pass that gradients' and weights' traffic can hide behind, where it overlaps (ZeRO 1 to 3 with `overlap_comm`).
OVERLAP = 0.8
# How often a saved activation's bytes move in elementwise work, forward and backward: five times if every operation were
# fused with its neighbours (written and read; read, its gradient written and read), twice that by published runs.
ELEMENTWISE_PASSES = 10
HOST_BANDWIDTH = 40e9  # bytes/s of a host's memory for each of its devices; typical of eight on a node
RESTART_SECONDS = 600.0  # until a failed job trains again: detection, queue, start, loading


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause, on the slowest rank."""

    products: float  # matrix products
    imbalance: float  # of the products, because the fullest rank's experts have more than their share
    elementwise: float
    overhead: float
    all_to_all: float
    gradients: float  # what of reduction and gathering is not hidden behind the backward pass
    optimizer: float
    bubble: float  # of a pipeline, which published runs have

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(model: Any, layout: Layout, machine: Hardware, max_vio: float = 0.0) -> StepTime:
    """Of a step of all ranks.

    Args:
        model: `settings.Model` with its vocabulary filled in.
        max_vio: the fullest expert's rows over the mean, minus 1 (arXiv 2408.15664).
    """
    passes = layout.accumulation
    dense, experts = (passes * seconds for seconds in product_seconds(model, layout, machine))
    stretched = experts * load_stretch(max_vio, model.num_experts, layout.expert)
    elementwise = passes * elementwise_seconds(model, layout, machine)
    overhead = passes * overhead_seconds(model, layout, machine)
    exchange = passes * all_to_all_seconds(model, layout, machine, max_vio)
    if layout.hides_all_to_all:
        exchange = max(0.0, exchange - dense - experts)
    busy = dense + experts + stretched + elementwise + overhead + exchange
    bubble = busy * (layout.pipeline - 1) / (layout.interleave * passes) if layout.pipeline > 1 else 0.0
    # Gradients move in the backward pass, without partitions only in the last one; ZeRO 3 fetches weights in both passes.
    behind = (dense + experts) * (1 if layout.zero == 3 else 2 / 3) / (passes if layout.zero < 2 else 1)
    traffic = gradient_seconds(model, layout, machine)
    hidden = OVERLAP * behind if layout.zero and layout.device == "cuda" else 0.0
    return StepTime(
        products=dense + experts,
        imbalance=stretched,
        elementwise=elementwise,
        overhead=overhead,
        all_to_all=exchange,
        gradients=max(0.0, traffic - hidden),
        optimizer=optimizer_seconds(model, layout, machine),
        bubble=bubble,
    )


def recomputed(layout: Layout) -> tuple[bool, bool]:
    """Whether the backward pass makes attention's products again, and those of the feed-forward layers."""
    return layout.recompute in ("attention", "full"), layout.recompute in ("experts", "full")


def overhead_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Of a pass: what a layer costs however few tokens there are; a third of it in the forward pass."""
    again = 1 / 3 if layout.recompute == "selective" else sum(recomputed(layout)) / 6
    return model.num_hidden_layers / layout.pipeline * machine.overhead * (1 + again)


def product_seconds(model: Any, layout: Layout, machine: Hardware) -> tuple[float, float]:
    """Of a forward and backward pass, outside and inside the routed experts: FLOPs over the reachable share of the peak.

    2 FLOPs per weight and token, three times over (PaLM, arXiv 2204.02311, appendix B); recomputation adds a forward pass of
    the layers, not of the head.
    In fp8 training, attention's own products and the head stay in bf16 (DeepSeek-V3, arXiv 2412.19437, section 3.3.1).
    """
    dense, experts = product_weights(model)
    head, attention = model.hidden_size * model.vocab_size, attention_weights(model)
    tokens = layout.tokens / (layout.tensor * layout.pipeline)
    flops, wide = machine.flops(layout.dtype), machine.flops("bf16" if layout.dtype == "fp8" else layout.dtype)
    in_attention, in_experts = (3 + again for again in recomputed(layout))
    outside = 3 * 2 * head / wide + in_experts * 2 * (dense - head - attention) / flops
    outside += in_attention * (2 * attention / flops + attention_flops(model, layout.seq_len) / wide)
    return tokens * outside, tokens * in_experts * 2 * experts / flops


def elementwise_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Of norms, rotary embedding, SwiGLU, sorting and combining in a pass: bytes moved over memory bandwidth."""
    moved = ELEMENTWISE_PASSES * saved_elements(model, swiglu=4) * layout.element_bytes * layout.tokens
    return moved / (layout.tensor * layout.pipeline) / machine.bandwidth


def all_to_all_seconds(model: Any, layout: Layout, machine: Hardware, max_vio: float = 0.0) -> float:
    """Of a pass: in every layer rows go to their experts and come back, and their gradients the same way (GShard, arXiv
    2006.16668, section 3.3); recomputation sends them once more."""
    if layout.expert == 1:
        return 0.0
    once = exchange_seconds(model, layout, machine, 1 + load_stretch(max_vio, model.num_experts, layout.expert))
    times = 4 if layout.recompute in ("none", "attention") else 6
    return layers_of(model)[1] / layout.pipeline * once * times


def exchange_seconds(model: Any, layout: Layout, machine: Hardware, skew: float) -> float:
    """Of one all-to-all, on a rank whose experts have `skew` times the mean rank's rows.

    Alpha-beta model: a latency for each peer, and bytes over bandwidth, to peers of the node and to others at the same time.
    A rank has tokens x K rows of H numbers, of which (ep - 1) / ep have their expert elsewhere; the fullest rank gets more.
    """
    size = layout.expert
    rows = layout.tokens / layout.tensor * model.num_experts_per_tok
    row_bytes = model.hidden_size * layout.element_bytes
    near = min(size, layout.per_node)
    per_peer = rows * row_bytes / size * skew
    inside = (near - 1) * per_peer / (LINK_SHARE * machine.link.bandwidth)
    outside = (size - near) * per_peer / (LINK_SHARE * machine.fabric.bandwidth)
    latency = (near - 1) * machine.link.latency + (size - near) * machine.fabric.latency
    if layout.once_per_node and size > near:
        nodes = size // near
        chosen = min(nodes, layout.most_nodes or nodes)
        # Of the chosen nodes, those that at least one of a row's K experts is on, and that are not its own.
        copies = chosen * (1 - (1 - 1 / chosen) ** model.num_experts_per_tok) * (nodes - 1) / nodes
        sent = layout.tokens / layout.tensor * row_bytes * copies * skew
        outside = sent / (LINK_SHARE * machine.fabric.bandwidth)
        latency = (near - 1) * machine.link.latency + (nodes - 1) * machine.fabric.latency  # one peer in each node
    return latency + max(inside, outside)


def gradient_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Of a step's reductions and gatherings, hidden or not (ZeRO, arXiv 1910.02054, section 7).

    Over n ranks, (n - 1) / n of the bytes move for a reduction to slices, the same for gathering slices, and both for a
    reduction to all; latencies add up along a tree of depth log2(n), as in NCCL's double binary trees. Dense weights are
    reduced over all replicas, an expert's over those that hold it. ZeRO 2 and 3 reduce in every pass; ZeRO 3 also gathers
    weights, before the forward and before the backward pass, and what is computed again once more.
    """
    width = layout.gradient_bytes or layout.element_bytes
    total, passes = 0.0, layout.accumulation
    parts = zip(rank_parameters(model, layout), regathered_weights(model, layout), strict=True)
    for (parameters, replicas, near), again in parts:
        if replicas == 1:
            continue
        reduced, gathered = parameters * width, parameters * layout.element_bytes
        volume = {
            0: 2 * reduced,
            1: reduced + gathered,
            2: passes * reduced + gathered,
            3: passes * (reduced + (2 + again) * gathered),
        }[layout.zero]
        bandwidth, latency = egress_link(near, replicas, machine)
        total += (replicas - 1) / replicas * volume / bandwidth + 2 * math.log2(replicas) * latency
    return total


def regathered_weights(model: Any, layout: Layout) -> tuple[float, float]:
    """Shares of the weights outside and inside the routed experts that ZeRO 3 gathers once more to compute again."""
    blocks = layout.recompute in ("selective", "full")
    attention = attention_weights(model) / parameter_counts(model)[0] if layout.recompute == "attention" else 0.0
    return (1.0 if blocks else attention), float(blocks or layout.recompute == "experts")


def egress_link(near: int, ranks: int, machine: Hardware) -> tuple[float, float]:
    """Bandwidth and latency of a collective over `ranks`, `near` of them in each node.

    Where it leaves nodes, all its ranks of a node share their ways out, up to what links inside carry.
    """
    if ranks <= near:
        return LINK_SHARE * machine.link.bandwidth, machine.link.latency
    return LINK_SHARE * min(machine.link.bandwidth, near * machine.fabric.bandwidth), machine.fabric.latency


def optimizer_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Of the update: what AdamW reads and writes of the slice that this rank keeps, over memory bandwidth; with Muon also
    its products, in fp32, which the ranks that hold the same, or parts of it, share out.

    Read: gradient, weight, two moments; written: weight and moments; all fp32, and a bf16 copy where weights are bf16. An
    offloaded optimizer gets its gradients over the host's link, sends weights back, and works at `HOST_BANDWIDTH`.
    """
    width = 28 + (2 if layout.element_bytes == 2 else 0)
    kept = sum(n / (replicas if layout.zero else 1) for n, replicas, _ in rank_parameters(model, layout))
    products = 0.0
    if layout.optimizer == "muon":
        parts = zip(orthogonalization_flops(model), rank_parameters(model, layout), (1, layout.expert), strict=True)
        products = sum(flops / apart / replicas for flops, (_, replicas, _), apart in parts) / machine.flops("fp32")
    if layout.offload:
        return products + kept * (2 * layout.element_bytes / machine.host_link + width / HOST_BANDWIDTH)
    return products + kept * width / machine.bandwidth


@dataclass(frozen=True)
class RunTime:
    """What a whole run takes."""

    seconds: float  # with stalls and failures
    training: float  # without
    checkpoints: float
    failures: float  # lost work and restarts, expected
    expected_failures: float
    device_hours: float


def run_time(step: float, steps: int, layout: Layout, machine: Hardware, every: int, saved_bytes: float) -> RunTime:
    """Of `steps` steps, with a checkpoint after each `every` (0: none).

    A checkpoint stalls a rank while its `saved_bytes` are copied to the host; writing goes on beside the training. Failures
    come at random: one costs half the time between two checkpoints and a restart (Young, CACM 17(9), 1974).
    """
    training = steps * step
    stalls = steps // every * saved_bytes / machine.host_link if every else 0.0
    rate = layout.world / (machine.failures * 3600)  # per second
    expected = (training + stalls) * rate
    lost = min(every or steps, steps) * step / 2 + RESTART_SECONDS
    failed = expected * lost
    seconds = training + stalls + failed
    return RunTime(seconds, training, stalls, failed, expected, seconds * layout.world / 3600)
