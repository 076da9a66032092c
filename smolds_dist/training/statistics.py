"""Statistics of weights, gradients, updates, activations and attention logits, in every `log.statistics_every`-th step.

Shape letters: L layers, K statistics of the update, G groups (a part of the model in a layer).
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from smolds_dist.model import DeepSeekV3Block
from smolds_dist.model.regions import eager_regions
from smolds_dist.parallel.engine import Engine, read_together
from smolds_dist.parallel.fragments import Fragment
from smolds_dist.training.qk_clip import QkClip

KINDS = ("weight", "gradient", "update")
# Parts of the model by the first pattern that a tensor's name matches
PATTERNS = (
    ("embedding", "embed_tokens"), ("head", "lm_head"), ("final_norm", r"^model\.norm"), ("norms", "norm"),
    ("attention_q", r"self_attn\.q"), ("attention_kv", r"self_attn\.kv"), ("attention_k", r"self_attn\.k"),
    ("attention_v", r"self_attn\.v"), ("attention_o", r"self_attn\.o"), ("router", r"mlp\.gate\."),
    ("shared_experts", "shared_experts"), ("experts", "experts"), ("dense", "mlp"), ("other", ""),
)  # fmt: skip
Group = tuple[str, int]  # a part of the model, and the layer; 0 for parts outside layers


def group_of(name: str) -> Group:
    """Return the group of a logical tensor."""
    layer = re.search(r"layers\.(\d+)\.", name)
    return next(part for part, pattern in PATTERNS if re.search(pattern, name)), int(layer[1]) if layer else 0


class Statistics:
    """Measures one step at a time. All sums are over the elements of all ranks, each counted once.

    Activations and logits are measured by hooks in uncompiled passes without graphs, so that no code is compiled again.
    Updates need a copy of the weights that the optimizer updates at a time.

    Args:
        every: steps between measured steps; 0 = off.
        grad_clip: the run's largest gradient norm; 0 = no clipping.
    """

    def __init__(self, engine: Engine, qk_clip: QkClip, every: int, grad_clip: float):
        self.engine, self.qk_clip, self.every, self.grad_clip = engine, qk_clip, every, grad_clip
        self.blocks = [module for module in engine.model.modules() if isinstance(module, DeepSeekV3Block)]
        self._sizes: dict[Group, int] = {}  # elements
        for name, shape in engine.tensor_shapes().items() if every else ():
            self._sizes[group_of(name)] = self._sizes.get(group_of(name), 0) + math.prod(shape)
        self._clear()

    def _clear(self) -> None:
        self._largest_L = torch.zeros(len(self.blocks), device=self.engine.device)
        self._sums: list[tuple[str, list[Group], Tensor]] = []  # squares, on the device
        self._shares: list[Fragment] = []
        self._copies: list[Tensor] = []

    def is_due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Wrap the passes of a measured step."""
        self._clear()
        self.qk_clip.record(True)
        with ExitStack() as stack:
            stack.enter_context(eager_regions())
            stack.enter_context(eager_blocks(self.blocks))
            stack.enter_context(self.engine.without_graphs())
            for layer, block in enumerate(self.blocks):
                hook = block.register_forward_hook(
                    lambda _, __, out_BSH, layer=layer: self._add_activation(layer, out_BSH)
                )
                stack.callback(hook.remove)
            yield

    @torch.no_grad()
    def _add_activation(self, layer: int, x_BSH: Tensor) -> None:
        largest = torch.linalg.vector_norm(x_BSH.detach(), torch.inf).float()
        self._largest_L[layer] = torch.maximum(self._largest_L[layer], largest)

    def before_update(self, fragments: Sequence[Fragment]) -> None:
        """Measure slices that the optimizer is about to update, with their clipped gradients ("gradient"), and copy them."""
        self._shares = [share for f in fragments if len((share := f.share()).tensors["value"])]
        self._add("weight", [share.tensors["value"] for share in self._shares])
        self._add("gradient", [share.tensors["gradient"] for share in self._shares])
        self._copies = [share.tensors["value"].clone() for share in self._shares]

    def after_update(self) -> None:
        """Measure how the slices of the last `before_update` have changed."""
        pairs = zip(self._copies, self._shares, strict=True)
        self._add("update", [copy.sub_(share.tensors["value"]) for copy, share in pairs])
        self._shares, self._copies = [], []

    def _add(self, kind: str, tensors: list[Tensor]) -> None:
        # Not a norm: on a CPU its error for 20 million fp32 elements is 1e-3, but that of this sum is 1e-7.
        if tensors:
            # An offloaded optimizer's tensors are on the host.
            squares = torch.stack([tensor.square().sum() for tensor in tensors]).to(self.engine.device)
            self._sums.append((kind, [group_of(share.name) for share in self._shares], squares))

    def row(self, norm: float, logits_LN: Tensor) -> dict:
        """Return the measured step's values for metrics.jsonl: root mean squares by part, with a list over layers (None for
        a layer without the part), and the largest activations and logits of each layer. Collective.

        Args:
            norm: of the gradients before clipping.
            logits_LN: largest logits of all ranks.
        """
        if dist.is_initialized():
            dist.all_reduce(self._largest_L, dist.ReduceOp.MAX)
        largest_L, *squares = read_together([self._largest_L, *(one for _, _, one in self._sums)])
        places = {group: place for place, group in enumerate(self._sizes)}
        sums_KG = torch.zeros(len(KINDS), len(places), dtype=torch.float64)
        for (kind, groups, _), values in zip(self._sums, squares, strict=True):
            index = torch.tensor([places[group] for group in groups])
            sums_KG[KINDS.index(kind)].index_add_(0, index, values.double())
        sums_KG = self.engine.sum_over_ranks(sums_KG).cpu()
        if self.grad_clip:
            sums_KG[KINDS.index("gradient")] *= max(1.0, (norm + 1e-6) / self.grad_clip) ** 2
        found: dict[str, dict[str, list]] = {}
        for kind, sums_G in zip(KINDS, sums_KG.tolist(), strict=True):
            of_parts = found.setdefault(kind, {})
            for (part, layer), square in zip(self._sizes, sums_G, strict=True):
                of_layers = of_parts.setdefault(part, [])
                of_layers += [None] * (layer + 1 - len(of_layers))
                of_layers[layer] = shortened(math.sqrt(square / self._sizes[part, layer]))
        self._clear()
        largest = {"max_activation": largest_L, "max_logits": logits_LN.amax(-1)}
        return found | {name: [shortened(one) for one in values.tolist()] for name, values in largest.items()}


@contextmanager
def eager_blocks(blocks: list[DeepSeekV3Block]) -> Iterator[None]:
    """Run compiled blocks uncompiled for a while."""
    names = [(block, name) for block in blocks for name in ("compiled_attend", "compiled_layer")]
    names += [(block.mlp, "compiled_mix") for block in blocks if hasattr(block.mlp, "compiled_mix")]
    before = [getattr(module, name) for module, name in names]
    for module, name in names:
        setattr(module, name, None)
    try:
        yield
    finally:
        for (module, name), compiled in zip(names, before, strict=True):
            setattr(module, name, compiled)


def shortened(value: float) -> float:
    return float(f"{value:.6g}")
