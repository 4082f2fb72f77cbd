"""The size of a network, R: the product of its layers' norms."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def weight_norm_product(
    model: nn.Module, *, log: bool = False, layers: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd)
) -> Tensor:
    r"""The product over a network's layers of the norms of their parameters, :math:`R = \prod_l \lVert\alpha^l\rVert`.

    :math:`\alpha^l` is weight and bias of a layer as one vector. With homogeneous activations and no biases the logits
    scale by R, so that :math:`X/R` depends on the weights' directions only. It is accumulated as :math:`\log R` in
    float64 on the weights' device, without a synchronisation: R of a WRN-28-10 is near the end of float32's range.

    Args:
        model: layers are its ``layers`` modules, itself included; norm layers and embeddings are none. Layers that
            share their weight are one layer with all their biases; a reparametrised weight counts as it is used.
        log: return :math:`\log R`.
        layers: the module types that count, each by its ``weight`` and ``bias``.

    Returns:
        0-d, float64, differentiable by every weight and bias. A layer that is all zero makes it 0 (log: -inf).

    Raises:
        ValueError: the model has no such layer.

    Example:
        >>> import torch, mlkernels
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> product = mlkernels.weight_norm_product(torch.nn.Sequential(layer, torch.nn.ReLU()))
        >>> round(product.item(), 4)
        4.2426

    Source: the two-scale loss, equation (9).
    """
    # Keyed by identity; the lists keep a reparametrised weight, made anew at each access, alive.
    by_weight: dict[int, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, layers):
            weight, bias = cast(Tensor, module.weight), getattr(module, "bias", None)
            parameters = by_weight.setdefault(id(weight), [weight])
            if bias is not None and all(bias is not other for other in parameters):
                parameters.append(bias)
    if not by_weight:
        names = ", ".join(layer.__name__.lstrip("_") for layer in layers)
        raise ValueError(f"model must have a layer of type {names}, got {type(model).__name__} with none")
    device = next(iter(by_weight.values()))[0].device
    norms = []
    for parameters in by_weight.values():
        each = [torch.linalg.vector_norm(p, dtype=torch.float64).to(device) for p in parameters]
        norms.append(each[0] if len(each) == 1 else torch.linalg.vector_norm(torch.stack(each)))
    log_norm = torch.stack(norms).log().sum()
    return log_norm if log else log_norm.exp()
