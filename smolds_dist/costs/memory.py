"""What a rank's memory holds, counted from the configuration; nothing is allocated.

Shape letters: H hidden, N query heads, G key/value heads, D head dimension, K experts per token, I expert width.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from smolds_dist.costs.flops import LOGITS_CHUNK, layers_of, product_weights
from smolds_dist.costs.layout import Layout, load_stretch

# Share of a device's memory that a plan may fill: estimates err, and others may use it too.
MEMORY_SHARE = 0.9
# Of what comes and goes in a step: an allocator keeps more than is in use, in pieces that fit nobody.
FRAGMENTATION = 0.05
# Gradients come while activations go. What of the smaller of both takes the other's place: on the CPU in one process in
# plain PyTorch, while under DeepSpeed nothing does; on a GPU with both.
REUSED = 0.5
# Numbers of one of DeepSpeed's buffers for gradients, what "auto" stands for as `reduce_bucket_size` in ds_configs. On CPUs
# no gradient travels while others are computed: smaller buffers are no slower, and a step of 26 million parameters in two
# ranks needs 1.2 instead of 1.5 GB, for what the heap takes from the buffers between two steps.
BUCKET = {"cpu": 4_000_000, "mps": 50_000_000, "cuda": 50_000_000}
# Numbers of the weights that ZeRO 3 gathers ahead in one piece, `stage3_prefetch_bucket_size` in ds_configs.
PREFETCHED = 10_000_000
# Numbers that ZeRO 3 steps at a time, each time with a copy of their gradients: `sub_group_size` in ds_configs.
SUB_GROUP = 20_000_000
# Of a process before there is a model, where nothing has been measured: Python's libraries, or CUDA's context and NCCL.
PROCESS_BYTES = {"cpu": 0.4e9, "mps": 1e9, "cuda": 1.5e9}
CUBLAS_WORKSPACE = 67e6  # bytes, two of 32 MiB
CPU_BF16_KERNELS = 90e6  # bytes that oneDNN compiles
CPU_RANKS = 100e6  # bytes that gloo, its threads and the holes in the heap take, which grow for about twenty steps


def parameter_counts(model: Any) -> tuple[int, int]:
    """Parameters outside and inside the routed experts of a `settings.Model` with its vocabulary filled in."""
    m = model
    if m.attention == "gqa":
        norms = m.head_dim * {None: 0, "head": 2, "all": m.num_attention_heads + m.num_key_value_heads}[m.qk_norm]
    else:
        norms = (m.q_lora_rank or 0) + m.kv_lora_rank
    outside = product_weights(m)[0]  # the vocabulary once
    outside += m.hidden_size + m.num_hidden_layers * (norms + 2 * m.hidden_size)
    untied = 0 if m.tie_word_embeddings else m.vocab_size * m.hidden_size
    return outside + untied, layers_of(m)[1] * m.num_experts * 3 * m.hidden_size * m.intermediate_size


def rank_parameters(model: Any, layout: Layout) -> list[tuple[float, int, int]]:
    """Of a rank without ZeRO, outside and inside the routed experts: parameters, ranks that hold the same, and how many of
    these are in one node. DeepSpeed's expert groups are consecutive ranks."""
    dense, experts = parameter_counts(model)
    shards = layout.tensor * layout.pipeline
    dense_near = max(1, layout.per_node // layout.tensor)
    return [
        (dense / shards, layout.replicas, min(dense_near, layout.replicas)),
        (experts / layout.pipeline / layout.expert, layout.world // layout.pipeline // layout.expert,
         max(1, layout.per_node // layout.expert)),
    ]  # fmt: skip


def saved_elements(model: Any, swiglu: int, skew: float = 1.0, recompute: str = "none") -> float:
    """Numbers that the forward pass keeps for the backward pass, for one token and all layers together.

    Args:
        swiglu: numbers that SwiGLU keeps, in widths of an expert.
        fuller: rows of the rank's experts over the mean rank's.
        recompute: as `Layout.recompute`.
    """
    m = model
    H, K, width = m.hidden_size, m.num_experts_per_tok, m.intermediate_size
    dense, mixtures = layers_of(m)
    N, key, value = m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    if recompute == "full":
        return m.num_hidden_layers * H
    if recompute == "selective":  # results of products
        if m.attention == "latent":
            projected = (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim
            projected += N * (key + m.qk_nope_head_dim + 2 * value)
        else:
            projected = 2 * m.head_dim * (N + m.num_key_value_heads)
        experts = m.num_experts + skew * K * (H + 2 * width)
        experts += (H + 2 * m.n_shared_experts * width) if m.n_shared_experts else 0
        feed_forward = mixtures * experts + dense * (H + 2 * (m.dense_intermediate_size or 0))
        # A block's input, and what attention adds to it.
        return m.num_hidden_layers * (2 * H + projected) + feed_forward
    if m.attention == "latent":
        attention = 2 * (m.q_lora_rank or 0) + 2 * m.kv_lora_rank + N * (2 * key + 3 * value)
    else:
        attention = m.head_dim * (3 * N + 2 * m.num_key_value_heads)  # q, out twice, k, v
        if m.qk_norm:  # their inputs
            attention += m.head_dim * (N + m.num_key_value_heads)
    experts = skew * K * (2 * H + swiglu * width) + m.n_shared_experts * 4 * width
    feed_forward = mixtures * experts + dense * 4 * (m.dense_intermediate_size or 0)
    if recompute == "attention":
        return m.num_hidden_layers * 2 * H + feed_forward  # what goes into a block, and into its feed-forward layer
    if recompute == "experts":
        feed_forward = 0
    return m.num_hidden_layers * (4 * H + attention) + feed_forward  # two norms' inputs and outputs


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the moment of a step when it holds most."""

    process: float  # before there is a model
    weights: float
    gradients: float
    optimizer: float  # moments, and the fp32 copy of bf16 weights
    activations: float
    logits: float  # of a chunk of tokens, and the vocabulary's gradient
    buffers: float  # that DeepSpeed reduces, gathers and exchanges in
    checkpoint: float  # its copy, where the device's memory is the host's
    allowance: float  # for what the allocator cannot use again

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts())

    @property
    def largest(self) -> str:
        return max(self.parts(), key=lambda part: part[1])[0]

    def parts(self) -> list[tuple[str, float]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def rank_memory(model: Any, layout: Layout, process: float = 0.0, max_vio: float = 0.0) -> Memory:
    """What the rank with the fullest experts needs.

    Args:
        model: `settings.Model` with its vocabulary filled in.
        process: bytes that the process has anyway, `Hardware.process`.
        max_vio: the fullest expert's rows over the mean, minus 1.
    """
    weights, gradients, optimizer = state_bytes(model, layout)
    skew = 1 + load_stretch(max_vio, model.num_experts, layout.expert)
    activations, logits = activation_bytes(model, layout, skew), logits_bytes(model, layout)
    buffers = buffer_bytes(model, layout, skew)
    allowance = FRAGMENTATION * (activations + gradients + logits + buffers)
    if layout.device == "cuda":
        gradients, coming = gpu_gradient_bytes(model, layout, activations)
        logits = max(0.0, logits - coming - gpu_bucket_bytes(layout))
    elif layout.engine == "local" and layout.accumulation == 1:
        activations -= REUSED * min(activations, gradients)
    copy = checkpoint_bytes(model, layout) if layout.copies and layout.device != "cuda" else 0.0
    return Memory(process, weights, gradients, optimizer, activations, logits, buffers, copy, allowance)


def gpu_gradient_bytes(model: Any, layout: Layout, activations: float) -> tuple[float, float]:
    """What gradients add to a GPU's memory with all activations, and how much of it is not there yet during the loss.

    Memory is fullest at one of three moments: during the loss, with gradients that outlive a step or the micro batch before
    and a chunk's logits; somewhere in the backward pass, where gradients and their buckets come, activations go and logits
    have gone; in the step, with all gradients and no activations. On one H200 with one rank, both engines, ZeRO 0 to 3, fp32
    and bf16, models of 120 and 330 million parameters, what a plan says was 0.93 to 1.04 of what was measured.
    """
    kept = summed = whole = 0.0  # fp32 that outlives a step; fp32 that does not; as the backward pass leaves them
    for parameters, replicas, _ in rank_parameters(model, layout):
        fp32 = parameters * 4 / (replicas if layout.zero else 1)
        if layout.zero == 3 or (layout.zero == 1 and layout.element_bytes == 2) or layout.accumulation > 1:
            kept += fp32
        else:
            summed += fp32
        if keeps_full_gradients(layout):
            whole += parameters * layout.element_bytes
    # Without ZeRO, DeepSpeed makes bf16 gradients fp32 where the step begins.
    late = layout.engine == "deepspeed" and not layout.zero and layout.element_bytes == 2
    in_backward = whole if late else whole + summed
    in_backward -= REUSED * min(activations, in_backward)
    coming = max(in_backward, whole + summed - activations - gpu_bucket_bytes(layout))
    return kept + coming, coming


def gpu_bucket_bytes(layout: Layout) -> float:
    """Two buckets of gradients, one filled while the other travels."""
    return 2 * (layout.bucket or BUCKET["cuda"]) * layout.element_bytes if layout.zero in (1, 2) else 0.0


def state_bytes(model: Any, layout: Layout) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state (ZeRO, arXiv 1910.02054, section 5).

    Per parameter: the weight; its gradient, fp32 where it is added up; for Adam two moments, for Muon one on matrices; in
    bf16 also an fp32 copy, which DeepSpeed's ZeRO keeps of fp32 weights too. ZeRO 1 cuts what the optimizer has over the
    ranks that hold the same, 2 the gradients too, 3 all. Offloading leaves the optimizer's to the host.
    """
    weight = layout.element_bytes
    moments = 8.0
    if layout.optimizer == "muon":
        embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        moments = 4 + 4 * embeddings / sum(parameter_counts(model))
    optimizer = moments + (4 if weight == 2 or layout.zero else 0)
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
    """Whether gradients stay as the backward pass leaves them, beside those in fp32.

    ZeRO 2 and 3 let go of them bucket by bucket; measured on CPUs, their memory is not used again before the step's end. In
    fp32 a GPU that shares nothing needs no second copy.
    """
    if layout.device == "cuda" and layout.element_bytes == 4 and layout.replicas == 1:
        return False
    unsharded = layout.zero == 0 and layout.engine == "deepspeed" and layout.element_bytes == 2
    return unsharded or layout.zero == 1 or (layout.zero >= 2 and layout.device == "cpu")


def activation_bytes(model: Any, layout: Layout, skew: float = 1.0) -> float:
    """Of what the forward pass keeps; and of what is computed again, one block's."""
    tokens, width = layout.tokens, layout.element_bytes
    # Our own function keeps gate and up. What DeepSpeed and grouped products leave to autograd keeps silu(gate), their
    # product, or both.
    if layout.device == "cpu" or (layout.engine == "local" and layout.dtype == "fp32"):
        swiglu = 2
    else:
        swiglu = 4 if layout.engine == "local" else 3
    kept = saved_elements(model, swiglu, skew)
    if layout.device == "cuda" and width == 2:
        kept += layers_of(model)[1] * model.hidden_size * 2  # the router reads an fp32 copy
    if layout.recompute != "none":
        rest = saved_elements(model, swiglu, skew, layout.recompute)
        kept = rest + (kept - rest) / model.num_hidden_layers
    kept += 2 * model.hidden_size  # the last norm's input, and the loss's gradient
    return kept * tokens * width


def logits_bytes(model: Any, layout: Layout) -> float:
    """A chunk's logits, its gradient of the vocabulary's weight, and the sum of these in fp32, where there are several.

    A GPU computes a chunk's softmax in one go, in fp32, with one copy to work on; in bf16 the chunk before is still there.
    """
    chunk = min(LOGITS_CHUNK, layout.tokens)
    fp32 = 0 if layout.device == "cpu" else 4 if layout.element_bytes == 4 else 12
    logits = chunk * model.vocab_size * (layout.element_bytes + fp32)
    weight = model.vocab_size * model.hidden_size
    return logits + weight * (layout.element_bytes + (4 if layout.tokens > chunk else 0))


def buffer_bytes(model: Any, layout: Layout, skew: float = 1.0) -> float:
    """What tokens are exchanged in, what DeepSpeed's ZeRO reduces and gathers in, and what else libraries take.

    Two buckets of gradients, one filled while the other travels; an fp32 gradient of what is stepped at a time; with ZeRO 3
    the gathered weights, of which DeepSpeed lets a billion live, and the piece that they are copied out of.
    """
    held = rank_parameters(model, layout)
    own = sum(parameters for parameters, _, _ in held)
    buffers = 0.0
    if layout.expert > 1:  # rows as they are sent and as they come, of one layer
        buffers += (1 + skew) * layout.tokens * model.num_experts_per_tok * model.hidden_size * layout.element_bytes
    if layout.device == "cpu":
        buffers += CPU_BF16_KERNELS if layout.element_bytes == 2 else 0.0
        buffers += CPU_RANKS if layout.world > 1 else 0.0
    if layout.device == "cuda":
        buffers += CUBLAS_WORKSPACE + gpu_bucket_bytes(layout)
    elif layout.zero:
        bucket: float = layout.bucket or BUCKET[layout.device]
        if layout.device == "cpu":
            bucket = min(own, bucket)  # only what is written to is there
        slices = sum(parameters / replicas for parameters, replicas, _ in held)
        buffers += 2 * bucket * layout.element_bytes + 4 * (min(slices, SUB_GROUP) if layout.zero == 3 else slices)
    if layout.zero == 3 and layout.device == "cuda":  # one bucket, which outlives the step
        buffers += (layout.bucket or BUCKET["cuda"]) * layout.element_bytes
    if layout.zero == 3 and (layout.device != "cuda" or layout.replicas > 1):  # else there is nothing to gather
        buffers += (min(own, 1e9) + min(own, PREFETCHED)) * layout.element_bytes
    return buffers


def checkpoint_bytes(model: Any, layout: Layout) -> float:
    """Of what a rank writes into a checkpoint: its share of fp32 weights and the optimizer's state."""
    return sum(parameters * 12 / replicas for parameters, replicas, _ in rank_parameters(model, layout))


def with_vocabulary(config: Any) -> Any:
    """A `RunConfig`'s model; where its vocabulary is the tokenizer's, with an estimate of it."""
    trained = config.data.tokenizer == "train"
    vocabulary = config.model.vocab_size or (config.data.tokenizer_vocab_size if trained else 49_152)
    return replace(config.model, vocab_size=vocabulary)
