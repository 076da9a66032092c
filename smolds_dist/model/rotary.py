"""Rotary position embedding.

Shape letters: B batch, S sequence, P rotary dimensions.
"""

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864, equation 34), in fp32.

    Computed anew from the positions, because a stored frequency buffer would be rounded when the model is cast to bf16.

    Args:
        position_ids: [B, S].
        dim: P, even.
        theta: base wavelength.

    Returns:
        Two tensors [B, S, P/2].
    """
    exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
    angles = position_ids[..., None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + P/2) of the last dimension of x [B, heads, S, P]; computed in fp32, returned in x's dtype."""
    return _Rotate.apply(x, cos[:, None], sin[:, None])


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back; autograd would keep and add up what each product was made of."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    to_first, to_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return turned.to(x.dtype)
