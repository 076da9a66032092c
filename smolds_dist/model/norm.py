"""Root mean square normalization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolds_dist.model import device


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, equation 4); statistics in fp32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if device.family(x) == "cpu" and not device.is_traced():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    """RMSNorm on the CPU by LayerNorm's fused gradient, in under half the time of PyTorch's unfused RMSNorm."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        grad, size = grad.to(x.dtype), x.shape[-1]
        # LayerNorm's gradient with mean 0 subtracts one term too many, as its mean depends on x: add it back.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(inverse), inverse, weight.float(), None, [True, True, False]
        )
        grad_mean = (grad @ (weight.to(x.dtype) / size))[..., None]
        return grad_x.add_((inverse * grad_mean).to(x.dtype)), grad_weight.to(weight.dtype), None
