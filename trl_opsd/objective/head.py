"""The language-model head, apart from its matrix product."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Head:
    """
    A language-model head: logits = softcap(scale · (hidden · weightᵀ + bias)).

    Args:
        weight (`torch.Tensor` of shape `(V, H)`):
            Projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits (Cohere, Granite, Falcon-H1, ...).
        softcap (`float`, *optional*):
            Logits y become softcap · tanh(y / softcap) (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def finish(self) -> "Finish":
        """What follows the matrix product."""
        return Finish(self.bias, self.scale, self.softcap)

    def detached(self, dtype: torch.dtype) -> "Finish":
        """The same without a gradient, its bias in a dtype."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return Finish(bias, self.scale, self.softcap)


@dataclass(frozen=True)
class Finish:
    """
    What a head does after its matrix product.

    Args:
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            See [`Head`].
        scale (`float`):
            See [`Head`].
        softcap (`float`, *optional*):
            See [`Head`].
    """

    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from products `hidden · weightᵀ` of shape `(..., V)`."""
        if self.bias is not None:
            products = products + self.bias
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is not None:
            products = self.softcap * torch.tanh(products / self.softcap)
        return products

    def pull_back(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the products (plus bias), from that with respect to the logits."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad
