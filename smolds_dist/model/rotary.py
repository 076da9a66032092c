"""Rotary position embedding.

Shape letters: B batch, S sequence, P rotary dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from smolds_dist.model import device


def rotary_angles(
    position_ids: Tensor, dim: int, theta: float, yarn: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864, equation 34), in fp32.

    Frequencies are computed in every call, because a buffer would be rounded when the model is cast to bf16.

    Args:
        position_ids: [B, S].
        dim: P, even.
        theta: base wavelength.
        yarn: `DeepSeekV3Config.rope_scaling`.

    Returns:
        Two tensors [B, S, P/2]; with YaRN multiplied by its attention factor.
    """
    exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
    frequencies = theta**-exponents
    if yarn is None:
        angles = position_ids[..., None].float() * frequencies
        return angles.cos(), angles.sin()
    share = _interpolated_share(frequencies, dim, theta, yarn)
    angles = position_ids[..., None].float() * (frequencies * (1 - share) + frequencies / yarn["factor"] * share)
    factor = _attention_factor(yarn)
    return angles.cos() * factor, angles.sin() * factor


def _interpolated_share(frequencies: Tensor, dim: int, theta: float, yarn: dict[str, Any]) -> Tensor:
    """Return how far each frequency is interpolated, from 0 (fast ones) to 1 (YaRN, arXiv 2309.00071, equation 18), linear
    between the dimensions that rotate `beta_fast` and `beta_slow` times within the original length."""

    def dimension(turns: float) -> float:
        length = yarn["original_max_position_embeddings"]
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.get("beta_fast") or 32), dimension(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    places = torch.arange(dim // 2, device=frequencies.device, dtype=torch.float32)
    return ((places - low) / max(high - low, 0.001)).clamp(0, 1)


def _attention_factor(yarn: dict[str, Any]) -> float:
    """Return the factor of cosine and sine, hence of scores by its square (YaRN, equation 22); DeepSeek's checkpoints, with
    `mscale` and `mscale_all_dim`, leave most of it to `score_factor`."""
    if yarn.get("attention_factor") is not None:
        return yarn["attention_factor"]
    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return _mscale(yarn["factor"], yarn["mscale"]) / _mscale(yarn["factor"], yarn["mscale_all_dim"])
    return _mscale(yarn["factor"], 1.0)


def score_factor(yarn: dict[str, Any] | None) -> float:
    """Return the extra factor of latent attention's scores, which DeepSeek-V2 and V3 set by `mscale_all_dim`."""
    if not yarn or not yarn.get("mscale_all_dim"):
        return 1.0
    return _mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + P/2) of the last dimension of x [B, heads, S, P]; computes in fp32, returns x's dtype."""
    if device.is_fused(x):  # in the memory's order, as a projection has written it and its gradient reads it
        x, cos, sin = x.transpose(1, 2), cos[:, :, None], sin[:, :, None]
        first, second = (half.float() for half in x.chunk(2, dim=-1))
        halves = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
        return torch.cat(halves, dim=-1).transpose(1, 2)
    cos, sin = cos[:, None], sin[:, None]
    if not device.is_traced():
        return _Rotate.apply(x, cos, sin)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Rotate; the gradient is the inverse rotation, for which autograd would save the inputs of every multiplication."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    to_first, to_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return turned.to(x.dtype)
