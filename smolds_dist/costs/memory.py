"""Memory per rank, estimated from the configuration; nothing is allocated.

Shape letters: H hidden, N query heads, G key/value heads, D head dimension, K experts per token, I expert width.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from smolds_dist.architecture import LOGITS_CHUNK
from smolds_dist.costs.flops import head_weights, layers_of, matmul_weights
from smolds_dist.costs.layout import Layout, load_stretch

# Fraction of a device's memory that a plan may use: estimates err, and other programs may use it too.
MEMORY_SHARE = 0.9
# Fraction of a step's temporary memory that the allocator loses to fragmentation.
FRAGMENTATION = 0.05
# Gradients are allocated while activations are freed. Fraction of the smaller of both that reuses the other's memory: on the
# CPU in one process in plain PyTorch (under DeepSpeed none), on a GPU with both engines.
REUSED = 0.5
# Elements per DeepSpeed gradient bucket: "auto" for `reduce_bucket_size` in ds_configs. On CPUs communication does not
# overlap with compute: smaller buckets are no slower, and a step of 26 million parameters on two ranks needs 1.2 instead of
# 1.5 GB, because the heap does not return the buckets' memory between steps.
BUCKET = {"cpu": 4_000_000, "mps": 50_000_000, "cuda": 50_000_000}
# Elements per ZeRO 3 weight prefetch, `stage3_prefetch_bucket_size` in ds_configs.
PREFETCHED = 10_000_000
# Elements per ZeRO 3 optimizer sub-step, each with a copy of its gradients: `sub_group_size` in ds_configs.
SUB_GROUP = 20_000_000
# Bytes of a process without a model, if not measured: Python's libraries, or CUDA's context and NCCL.
PROCESS_BYTES = {"cpu": 0.4e9, "mps": 1e9, "cuda": 1.5e9}
CUBLAS_WORKSPACE = 67e6  # bytes, two of 32 MiB
CPU_BF16_KERNELS = 90e6  # bytes of oneDNN's compiled kernels
CPU_RANKS = 100e6  # bytes of gloo, its threads and heap fragmentation, which grows for about twenty steps


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return the parameters outside and inside the routed experts of a `settings.Model` with its vocabulary size set."""
    m = model
    if m.attention == "gqa":
        norms = m.head_dim * {None: 0, "head": 2, "all": m.num_attention_heads + m.num_key_value_heads}[m.qk_norm]
    else:
        norms = (m.q_lora_rank or 0) + m.kv_lora_rank
    outside = matmul_weights(m)[0] - head_weights(m)
    outside += m.hidden_size * (1 + 3 * m.num_nextn_predict_layers) + sum(layers_of(m)) * (norms + 2 * m.hidden_size)
    untied = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
    return outside + untied, layers_of(m)[1] * m.num_experts * 3 * m.hidden_size * m.intermediate_size


def rank_parameters(model: Any, layout: Layout) -> list[tuple[float, int, int]]:
    """Return, outside and inside the routed experts, a rank's parameters without ZeRO, their replicas, and replicas per
    node. DeepSpeed's expert groups are consecutive ranks."""
    dense, experts = parameter_counts(model)
    shards = layout.tensor * layout.pipeline
    dense_near = max(1, layout.per_node // layout.tensor)
    return [
        (dense / shards, layout.replicas, min(dense_near, layout.replicas)),
        (experts / layout.pipeline / layout.expert, layout.world // layout.pipeline // layout.expert,
         max(1, layout.per_node // layout.expert)),
    ]  # fmt: skip


def saved_elements(model: Any, swiglu: int, skew: float = 1.0, recompute: str = "none") -> float:
    """Return the activation elements that the forward pass saves for the backward pass, per token over all layers.

    Args:
        swiglu: elements that SwiGLU saves, in widths of an expert.
        skew: rows of the rank's experts over the mean rank's.
        recompute: as in `Layout.recompute`.
    """
    m = model
    H, K, width = m.hidden_size, m.num_experts_per_tok, m.intermediate_size
    dense, mixtures = layers_of(m)
    layers = dense + mixtures
    # Of a depth: embeddings and hidden states before and after their norms, the input of its last norm and the loss's
    # gradient. Recomputed, embeddings and the gradient; selective also keeps the projection.
    ahead = m.num_nextn_predict_layers * {"full": 2, "selective": 3}.get(recompute, 6) * H
    N, key, value = m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    if recompute == "full":
        return layers * H + ahead
    if recompute == "selective":  # results of matmuls
        if m.attention == "latent":
            projected = (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim
            projected += N * (key + m.qk_nope_head_dim + 2 * value)
        else:
            projected = 2 * m.head_dim * (N + m.num_key_value_heads)
        experts = m.num_experts + skew * K * (H + 2 * width)
        experts += (H + 2 * m.n_shared_experts * width) if m.n_shared_experts else 0
        feed_forward = mixtures * experts + dense * (H + 2 * (m.dense_intermediate_size or 0))
        # A block's input, and attention's output.
        return layers * (2 * H + projected) + feed_forward + ahead
    if m.attention == "latent":
        attention = 2 * (m.q_lora_rank or 0) + 2 * m.kv_lora_rank + N * (2 * key + 3 * value)
    else:
        attention = m.head_dim * (3 * N + 2 * m.num_key_value_heads)  # q, out twice, k, v
        if m.qk_norm:  # their inputs
            attention += m.head_dim * (N + m.num_key_value_heads)
    experts = skew * K * (2 * H + swiglu * width) + m.n_shared_experts * 4 * width
    feed_forward = mixtures * experts + dense * 4 * (m.dense_intermediate_size or 0)
    if recompute == "attention":
        return layers * 2 * H + feed_forward + ahead  # a block's input, and its feed-forward layer's
    if recompute == "experts":
        feed_forward = 0
    return layers * (4 * H + attention) + feed_forward + ahead  # two norms' inputs and outputs


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a rank in a step."""

    process: float  # without a model
    weights: float
    gradients: float
    optimizer: float  # moments, the fp32 copy of bf16 weights, moving averages
    activations: float
    logits: float  # of a chunk of tokens, and the LM head's gradient
    buffers: float  # for reductions, gathers and all-to-all
    checkpoint: float  # its copy, if the device's memory is the host's
    allowance: float  # for fragmentation

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts())

    @property
    def largest(self) -> str:
        return max(self.parts(), key=lambda part: part[1])[0]

    def parts(self) -> list[tuple[str, float]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def rank_memory(model: Any, layout: Layout, process: float = 0.0, max_vio: float = 0.0) -> Memory:
    """Return the memory of the rank with the most loaded experts.

    Args:
        model: `settings.Model` with its vocabulary size set.
        process: bytes of the process without a model, `Hardware.process`.
        max_vio: the most loaded expert's rows over the mean, minus 1.
    """
    weights, gradients, optimizer = state_bytes(model, layout)
    skew = 1 + load_stretch(max_vio, model.num_experts, layout.expert)
    activations, logits = activation_bytes(model, layout, skew), logits_bytes(model, layout)
    buffers = buffer_bytes(model, layout, skew)
    allowance = FRAGMENTATION * (activations + gradients + logits + buffers)
    if layout.device == "cuda":
        gradients, coming = gpu_gradient_bytes(model, layout, activations)
        logits = max(0.0, logits - coming - gpu_bucket_bytes(layout))
        if layout.captured:  # an evaluation's pass, beside the graphs' memory
            buffers += logits + activations / sum(layers_of(model))
    elif layout.engine == "local" and layout.accumulation == 1:
        activations -= REUSED * min(activations, gradients)
    copy = checkpoint_bytes(model, layout) if layout.copies and layout.device != "cuda" else 0.0
    return Memory(process, weights, gradients, optimizer, activations, logits, buffers, copy, allowance)


def gpu_gradient_bytes(model: Any, layout: Layout, activations: float) -> tuple[float, float]:
    """Return the bytes that gradients add to a GPU's peak with all activations, and the part allocated after the loss.

    The peak is at one of three moments: in the loss, with gradients that outlive a step or a micro batch and a chunk's
    logits; in the backward pass, which allocates gradients and buckets, frees activations and has freed the logits; in the
    optimizer step, with all gradients and no activations. Planned memory was 0.93 to 1.04 of the measured on one H200 with
    one rank, both engines, ZeRO 0 to 3, fp32 and bf16, models of 120 and 330 million parameters.
    """
    kept = summed = whole = 0.0  # fp32 that outlives a step; other fp32; in the backward pass's dtype
    # Without ZeRO, DeepSpeed copies bf16 weights' fp32 gradients to reduce them, after the backward pass (not measured).
    late = layout.engine == "deepspeed" and not layout.zero and layout.element_bytes == 2
    for parameters, replicas, _ in rank_parameters(model, layout):
        fp32 = parameters * 4 / (replicas if layout.zero else 1)
        if layout.zero == 3 or (layout.zero == 1 and layout.element_bytes == 2) or layout.accumulation > 1:
            kept += fp32
        else:
            summed += fp32
        if keeps_full_gradients(layout):
            whole += parameters * (4 if late else layout.element_bytes)
    if layout.captured:
        return kept + summed + whole, 0.0  # nothing reuses the activations' memory
    in_backward = summed if late else whole + summed
    in_backward -= REUSED * min(activations, in_backward)
    coming = max(in_backward, whole + summed - activations - gpu_bucket_bytes(layout))
    return kept + coming, coming


def gpu_bucket_bytes(layout: Layout) -> float:
    """Return the bytes of two gradient buckets: one is filled while the other is reduced."""
    return 2 * (layout.bucket or BUCKET["cuda"]) * layout.element_bytes if layout.zero in (1, 2) else 0.0


def state_bytes(model: Any, layout: Layout) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer state (ZeRO, arXiv 1910.02054, section 5).

    Per parameter: the weight; its gradient, accumulated in fp32; for Adam two moments, for Muon one on matrices; in bf16
    also an fp32 copy, which DeepSpeed's ZeRO keeps of fp32 weights too; with `ema` the moving average in fp32. ZeRO 1
    shards the optimizer state over the replicas, 2 also the gradients, 3 all. Offloading moves the optimizer state to the
    host.
    """
    weight = layout.element_bytes
    moments = 8.0
    if layout.optimizer == "muon":
        embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        moments = 4 + 4 * embeddings / sum(parameter_counts(model))
    optimizer = moments + (4 if weight == 2 or layout.zero else 0) + (4 if layout.ema else 0)
    found = [0.0, 0.0, 0.0]
    for parameters, replicas, _ in rank_parameters(model, layout):
        found[0] += parameters * weight / (replicas if layout.zero >= 3 else 1)
        found[1] += parameters * 4 / (replicas if layout.zero >= 1 else 1)
        if keeps_full_gradients(layout):
            found[1] += parameters * weight
        if not layout.offload:
            found[2] += parameters * optimizer / (replicas if layout.zero >= 1 else 1)
    return found[0], found[1], found[2]


def keeps_full_gradients(layout: Layout) -> bool:
    """Return True if the backward pass's full gradients are kept in addition to those accumulated in fp32.

    ZeRO 2 and 3 free them bucket by bucket; measured on CPUs, their memory is not reused before the step's end. In fp32 a
    GPU without replicas needs no second copy.
    """
    if layout.device == "cuda" and layout.element_bytes == 4 and layout.replicas == 1:
        return False
    unsharded = layout.zero == 0 and layout.engine == "deepspeed" and layout.element_bytes == 2
    return unsharded or layout.zero == 1 or (layout.zero >= 2 and layout.device == "cpu")


def activation_bytes(model: Any, layout: Layout, skew: float = 1.0) -> float:
    """Return the bytes of saved activations, and of one block's recomputed ones."""
    tokens, width = layout.tokens, layout.element_bytes
    # Our own function saves gate and up. Autograd, under DeepSpeed or with grouped matmuls, also saves silu(gate), its
    # product with up, or both.
    if layout.device == "cpu" or (layout.engine == "local" and layout.dtype == "fp32"):
        swiglu = 2
    else:
        swiglu = 4 if layout.engine == "local" else 3
    kept = saved_elements(model, swiglu, skew)
    if layout.device == "cuda" and width == 2:
        kept += layers_of(model)[1] * model.hidden_size * 2  # the router reads an fp32 copy
    if layout.recompute != "none":
        rest = saved_elements(model, swiglu, skew, layout.recompute)
        kept = rest + (kept - rest) / sum(layers_of(model))
    kept += 2 * model.hidden_size  # the last norm's input, and the loss's gradient
    return kept * tokens * width + fused_weights_bytes(model, layout)


def fused_weights_bytes(model: Any, layout: Layout) -> float:
    """Return the bytes of the experts' gate and up weights, which AutoEP copies to fuse them and keeps until the backward
    pass."""
    if layout.device != "cuda" or layout.engine == "local" or not fuses_gate_up(model, layout.tokens, layout.expert):
        return 0.0
    at_once = 1 if layout.recompute in ("none", "attention") else max(1, layers_of(model)[1])
    return rank_parameters(model, layout)[1][0] * 2 / 3 * layout.element_bytes / at_once


def fuses_gate_up(model: Any, tokens: int, expert: int) -> bool:
    """Return True if one matmul for gate and up projections, `gate_up_impl: fused`, moves less memory on a GPU.

    Per expert with R rows of H elements and width I, it saves six passes over R x H: of rows read once less in the forward
    pass and for the weights' gradient, and of the sum of two input gradients. It copies both weights, 2 I x H, and their
    gradients: eight passes over I x H. The copy is kept until the backward pass, hence the margin.
    """
    rows = tokens * model.num_experts_per_tok * expert / model.num_experts
    return rows >= 2 * model.intermediate_size


def logits_bytes(model: Any, layout: Layout) -> float:
    """Return the bytes of a chunk's logits, of each loss's gradient of the LM head, and, with several chunks, of their fp32
    sum.

    A GPU computes a chunk's softmax at a time, in fp32, with one temporary copy; in bf16 the previous chunk is still alive.
    """
    chunk = min(LOGITS_CHUNK[layout.device], layout.tokens)
    fp32 = 0 if layout.device == "cpu" else 4 if layout.element_bytes == 4 else 12
    logits = chunk * model.vocab_size * (layout.element_bytes + fp32)
    return logits + head_weights(model) * (layout.element_bytes + (4 if layout.tokens > chunk else 0))


def buffer_bytes(model: Any, layout: Layout, skew: float = 1.0) -> float:
    """Return the bytes of all-to-all buffers, of ZeRO's reductions and gathers, and of libraries.

    Two gradient buckets, one filled while the other is reduced; an fp32 gradient per optimizer sub-step; with ZeRO 3 the
    gathered weights, of which DeepSpeed keeps up to a billion, and the prefetch buffer that they are copied from.
    """
    held = rank_parameters(model, layout)
    own = sum(parameters for parameters, _, _ in held)
    buffers = 0.0
    if layout.expert > 1:  # sent and received rows of one layer
        buffers += (1 + skew) * layout.tokens * model.num_experts_per_tok * model.hidden_size * layout.element_bytes
    if layout.device == "cpu":
        buffers += CPU_BF16_KERNELS if layout.element_bytes == 2 else 0.0
        buffers += CPU_RANKS if layout.world > 1 else 0.0
    if layout.device == "cuda":
        buffers += CUBLAS_WORKSPACE + gpu_bucket_bytes(layout)
    elif layout.zero:
        bucket: float = layout.bucket or BUCKET[layout.device]
        if layout.device == "cpu":
            bucket = min(own, bucket)  # only written pages are resident
        slices = sum(parameters / replicas for parameters, replicas, _ in held)
        buffers += 2 * bucket * layout.element_bytes + 4 * (min(slices, SUB_GROUP) if layout.zero == 3 else slices)
    if layout.zero == 3 and layout.device == "cuda":  # one bucket, which outlives the step
        buffers += (layout.bucket or BUCKET["cuda"]) * layout.element_bytes
    if layout.zero == 3 and (layout.device != "cuda" or layout.replicas > 1):  # else there is nothing to gather
        buffers += (min(own, 1e9) + min(own, PREFETCHED)) * layout.element_bytes
    return buffers


def checkpoint_bytes(model: Any, layout: Layout) -> float:
    """Return the bytes that a rank writes into a checkpoint: its shard of fp32 weights, optimizer state and averages."""
    each = 16 if layout.ema else 12
    return sum(parameters * each / replicas for parameters, replicas, _ in rank_parameters(model, layout))


def with_vocabulary(config: Any) -> Any:
    """Return a `RunConfig`'s model with its vocabulary size set: an estimate, if it depends on the tokenizer."""
    trained = config.data.tokenizer == "train"
    vocabulary = config.model.vocab_size or (config.data.tokenizer_vocab_size if trained else 49_152)
    return replace(config.model, vocab_size=vocabulary)
