"""Time of a training step and of a run: closed formulas over a model, a layout and a machine.

Every cause is one function, whose docstring has its formula and source. Not modeled: input, host jitter, and congestion of
a shared fabric. Seconds and bytes are per rank throughout.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from smolds_dist.costs.flops import (
    attention_flops,
    attention_weights,
    head_weights,
    layers_of,
    matmul_weights,
    orthogonalization_flops,
)
from smolds_dist.costs.hardware import Hardware
from smolds_dist.costs.layout import Layout, load_stretch
from smolds_dist.costs.memory import parameter_counts, rank_parameters, saved_elements

# Fraction of a link's bandwidth that collectives reach; NCCL's own tests show 70 to 85 %.
LINK_SHARE = 0.75
# Fraction of a pass that can hide traffic of gradients and weights, if it overlaps (ZeRO 1 to 3 with `overlap_comm`).
OVERLAP = 0.8
# Memory accesses per saved activation in elementwise code, forward and backward: five if every operation were fused with its
# neighbors (written and read; read, its gradient written and read), twice that by published runs.
ELEMENTWISE_PASSES = 10
HOST_BANDWIDTH = 40e9  # bytes/s of host memory per device; typical with eight on a node
RESTART_SECONDS = 600.0  # until a failed job trains again: detection, queue, start, loading


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause, on the slowest rank."""

    products: float  # matmuls
    imbalance: float  # extra matmul time of the rank with the most loaded experts
    elementwise: float
    overhead: float
    all_to_all: float
    gradients: float  # reductions and gathers not hidden behind the backward pass
    optimizer: float
    bubble: float  # of a pipeline, in published runs

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(model: Any, layout: Layout, machine: Hardware, max_vio: float = 0.0) -> StepTime:
    """Return the time of a step.

    Args:
        model: `settings.Model` with its vocabulary size set.
        max_vio: the most loaded expert's rows over the mean, minus 1 (arXiv 2408.15664).
    """
    passes = layout.accumulation
    dense, experts = (passes * seconds for seconds in matmul_seconds(model, layout, machine))
    stretched = experts * load_stretch(max_vio, model.num_experts, layout.expert)
    elementwise = passes * elementwise_seconds(model, layout, machine)
    overhead = passes * overhead_seconds(model, layout, machine)
    exchange = passes * all_to_all_seconds(model, layout, machine, max_vio)
    if layout.hides_all_to_all:
        exchange = max(0.0, exchange - dense - experts)
    busy = dense + experts + stretched + elementwise + overhead + exchange
    bubble = busy * (layout.pipeline - 1) / (layout.interleave * passes) if layout.pipeline > 1 else 0.0
    # Gradients are reduced in the backward pass, with ZeRO 0 and 1 in the last one; ZeRO 3 gathers weights in both passes.
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
    """Return whether the backward pass recomputes attention's matmuls, and the feed-forward layers'."""
    return layout.recompute in ("attention", "full"), layout.recompute in ("experts", "full")


def overhead_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Return the overhead of a pass: a fixed cost per layer, a third of it in the forward pass."""
    again = 1 / 3 if layout.recompute == "selective" else sum(recomputed(layout)) / 6
    return sum(layers_of(model)) / layout.pipeline * machine.overhead * (1 + again)


def matmul_seconds(model: Any, layout: Layout, machine: Hardware) -> tuple[float, float]:
    """Return the matmul time of a forward and backward pass, outside and inside the routed experts: FLOPs over the reachable
    fraction of the peak.

    2 FLOPs per weight and token, times three (PaLM, arXiv 2204.02311, appendix B); recomputation adds a forward pass of the
    layers, not of the head. In fp8 training, attention's own matmuls and the head stay in bf16 (DeepSeek-V3, arXiv
    2412.19437, section 3.3.1).
    """
    dense, experts = matmul_weights(model)
    head, attention = head_weights(model), attention_weights(model)
    tokens = layout.tokens / (layout.tensor * layout.pipeline)
    flops, wide = machine.flops(layout.dtype), machine.flops("bf16" if layout.dtype == "fp8" else layout.dtype)
    in_attention, in_experts = (3 + again for again in recomputed(layout))
    outside = 3 * 2 * head / wide + in_experts * 2 * (dense - head - attention) / flops
    outside += in_attention * (2 * attention / flops + attention_flops(model, layout.seq_len) / wide)
    return tokens * outside, tokens * in_experts * 2 * experts / flops


def elementwise_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Return the time of norms, rotary embedding, SwiGLU, sorting and combine in a pass: bytes over memory bandwidth."""
    moved = ELEMENTWISE_PASSES * saved_elements(model, swiglu=4) * layout.element_bytes * layout.tokens
    return moved / (layout.tensor * layout.pipeline) / machine.bandwidth


def all_to_all_seconds(model: Any, layout: Layout, machine: Hardware, max_vio: float = 0.0) -> float:
    """Return the all-to-all time of a pass: dispatch and combine in every layer, forward and backward (GShard, arXiv
    2006.16668, section 3.3); recomputation adds a forward's."""
    if layout.expert == 1:
        return 0.0
    once = exchange_seconds(model, layout, machine, 1 + load_stretch(max_vio, model.num_experts, layout.expert))
    times = 4 if layout.recompute in ("none", "attention") else 6
    return layers_of(model)[1] / layout.pipeline * once * times


def exchange_seconds(model: Any, layout: Layout, machine: Hardware, skew: float) -> float:
    """Return the time of one all-to-all, on a rank whose experts have `skew` times the mean rank's rows.

    Alpha-beta model: a latency per peer, and bytes over bandwidth, to peers in the node and to others simultaneously. A rank
    has tokens x K rows of H elements, of which (ep - 1) / ep have remote experts; the most loaded rank receives more.
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
        # Expected remote nodes, among those selected, with at least one of a row's K experts.
        copies = chosen * (1 - (1 - 1 / chosen) ** model.num_experts_per_tok) * (nodes - 1) / nodes
        sent = layout.tokens / layout.tensor * row_bytes * copies * skew
        outside = sent / (LINK_SHARE * machine.fabric.bandwidth)
        latency = (near - 1) * machine.link.latency + (nodes - 1) * machine.fabric.latency  # one peer in each node
    return latency + max(inside, outside)


def gradient_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Return the time of a step's reductions and gathers, hidden or not (ZeRO, arXiv 1910.02054, section 7).

    Over n ranks, reduce-scatter and all-gather each move (n - 1) / n of the bytes, all-reduce twice that; latencies add up
    along a tree of depth log2(n), as in NCCL's double binary trees. Dense weights are reduced over all replicas, an expert's
    over its own, at ZeRO 0 in fp32. ZeRO 2 and 3 reduce in every pass; ZeRO 3 also gathers weights before the forward and
    the backward pass, and again for recomputation.
    """
    width = layout.gradient_bytes or (layout.element_bytes if layout.zero else 4)
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
    """Return the fractions of the weights outside and inside the routed experts that ZeRO 3 gathers to recompute."""
    blocks = layout.recompute in ("selective", "full")
    attention = attention_weights(model) / parameter_counts(model)[0] if layout.recompute == "attention" else 0.0
    return (1.0 if blocks else attention), float(blocks or layout.recompute == "experts")


def egress_link(near: int, ranks: int, machine: Hardware) -> tuple[float, float]:
    """Return bandwidth and latency of a collective over `ranks`, `near` of them in each node.

    Across nodes, its ranks in a node share their fabric links, up to the bandwidth of a link inside.
    """
    if ranks <= near:
        return LINK_SHARE * machine.link.bandwidth, machine.link.latency
    return LINK_SHARE * min(machine.link.bandwidth, near * machine.fabric.bandwidth), machine.fabric.latency


def optimizer_seconds(model: Any, layout: Layout, machine: Hardware) -> float:
    """Return the time of the update: AdamW's traffic for this rank's shard over memory bandwidth; with Muon also its
    matmuls in the run's dtype, divided among the ranks that hold the same weights or parts of them.

    Read: gradient, weight, two moments; written: weight and moments; all fp32, plus a bf16 copy of bf16 weights. An
    offloaded optimizer receives gradients over the host's link, sends weights back, and runs at `HOST_BANDWIDTH`.
    """
    width = 28 + (2 if layout.element_bytes == 2 else 0)
    kept = sum(n / (replicas if layout.zero else 1) for n, replicas, _ in rank_parameters(model, layout))
    products = 0.0
    if layout.optimizer == "muon":
        parts = zip(orthogonalization_flops(model), rank_parameters(model, layout), (1, layout.expert), strict=True)
        flops = sum(flops / apart / replicas for flops, (_, replicas, _), apart in parts)
        products = flops / machine.flops("fp32" if layout.dtype == "fp32" else "bf16")
    if layout.offload:
        return products + kept * (2 * layout.element_bytes / machine.host_link + width / HOST_BANDWIDTH)
    return products + kept * width / machine.bandwidth


@dataclass(frozen=True)
class RunTime:
    """Time of a run, in seconds."""

    seconds: float  # with stalls and failures
    training: float  # without
    checkpoints: float
    failures: float  # expected lost work and restarts
    expected_failures: float
    device_hours: float


def run_time(step: float, steps: int, layout: Layout, machine: Hardware, every: int, saved_bytes: float) -> RunTime:
    """Return the time of `steps` steps, with a checkpoint every `every` steps (0: none).

    A checkpoint stalls a rank while its `saved_bytes` are copied to the host; writing runs in the background. A failure
    costs half the time between two checkpoints plus a restart (Young, CACM 17(9), 1974).
    """
    training = steps * step
    stalls = steps // every * saved_bytes / machine.host_link if every else 0.0
    rate = layout.world / (machine.failures * 3600)  # per second
    expected = (training + stalls) * rate
    lost = min(every or steps, steps) * step / 2 + RESTART_SECONDS
    failed = expected * lost
    seconds = training + stalls + failed
    return RunTime(seconds, training, stalls, failed, expected, seconds * layout.world / 3600)
