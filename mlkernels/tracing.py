"""Who is watching: whether values can be looked at, and whether operators must be seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The level of the torch.func transform (grad, vmap, jvp, ...) that is running, or None; kernels are opaque to those.
functorch_level = torch._C._functorch.maybe_current_level
#: Whether it is many tensors, as is_grads_batched=True sends them, which is no level of torch.func.
is_batched = torch._C._functorch.is_legacy_batchedtensor
modes = torch._C._len_torch_dispatch_stack
#: Whether torch.jit.trace records; torch.compile must not ask.
is_jit_tracing = torch._C._is_tracing
PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})


def observed(*tensors: Tensor) -> bool:
    """Whether somebody wants to see operators: torch.compile, a dispatch mode (fake, make_fx, ...), a subclass."""
    return torch.compiler.is_compiling() or modes() > 0 or not PLAIN_TENSORS.issuperset(map(type, tensors))


def traced(*tensors: Tensor) -> bool:
    """Whether values cannot be looked at: torch.compile, torch.func, make_fx, fake tensors, the meta device."""
    if torch.compiler.is_compiling() or functorch_level() is not None:
        return True
    if not observed(*tensors):
        return False
    from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return (
        get_proxy_mode() is not None
        or any(isinstance(mode, FakeTensorMode) for mode in stack)
        or any(map(is_fake, tensors))
    )


def is_dual(tensor: Tensor) -> bool:
    """Whether it carries a tangent of forward-mode AD, which is no level of torch.func; asked inside one of its own."""
    return forward_ad.unpack_dual(tensor).tangent is not None
