"""How wide the compiled accesses to logits and gradients are, and how wide their addresses allow them to be;
``test_accesses.py`` runs this.

    python tests/accesses.py

prints one JSON object per layout. What is launched for real tensors is compiled as far as PTX; the registers that hold
an address are followed back to the argument that they come from. What is allowed is found by looking at all addresses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import aot
import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend

import mlkernels


def _flat(count: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    return torch.zeros(count + offset, dtype=dtype)[offset:]


#: Views of logits, by what is special about them; each takes a dtype.
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "aligned": lambda d: _flat(32 * 1024, d).view(32, 1024),
    "a multiple of 8": lambda d: _flat(32 * 1000, d).view(32, 1000),
    "a multiple of 2": lambda d: _flat(32 * 1002, d).view(32, 1002),
    "odd": lambda d: _flat(32 * 1001, d).view(32, 1001),
    "streamed": lambda d: _flat(2 * 65536, d).view(2, 65536),
    "begins oddly": lambda d: _flat(32 * 1024, d, 1).view(32, 1024),
    "begins at 4": lambda d: _flat(32 * 1024, d, 4).view(32, 1024),
    "sliced": lambda d: _flat(32 * 1040, d).view(32, 1040)[:, 2:1002],
    "odd rows": lambda d: _flat(32 * 1001, d).view(32, 1001)[:, :1000],
    "few": lambda d: _flat(4096 * 4, d).view(4096, 4),
    "one of many": lambda d: _flat(4096 * 16, d).view(4096, 16)[:, :1],
    "three of many": lambda d: _flat(4096 * 16, d).view(4096, 16)[:, :3],
    "every second": lambda d: _flat(64 * 40, d).view(64, 40)[:, ::2],
    "one row, expanded": lambda d: _flat(64, d).view(1, 64).expand(48, 64),
    "one class, expanded": lambda d: _flat(64, d).view(64, 1).expand(64, 20),
    "transposed": lambda d: _flat(64 * 40, d).view(40, 64).t(),
    "transposed, odd": lambda d: _flat(63 * 40, d).view(40, 63).t(),
    "transposed, begins oddly": lambda d: _flat(64 * 40, d, 1).view(40, 64).t(),
    "images of 14": lambda d: _flat(4 * 19 * 196, d).view(4, 19, 14, 14),
    "odd images": lambda d: _flat(16 * 19 * 35, d).view(16, 19, 5, 7),
    "images, sliced": lambda d: _flat(4 * 19 * 64, d).view(4, 19, 8, 8)[..., 1:7],
    "images, every second": lambda d: _flat(4 * 19 * 64, d).view(4, 19, 64)[..., ::2],
    "images, transposed": lambda d: _flat(4 * 19 * 64, d).view(4, 19, 8, 8).transpose(2, 3),
    "images, classes oddly apart": lambda d: _flat(4 * 19 * 65, d).view(4, 19, 65)[..., :64],
    "channels last": lambda d: _flat(4 * 24 * 64, d).view(4, 8, 8, 24).permute(0, 3, 1, 2),
}
#: A wrong width is a matter of halves nearly always; of these the others are tried, too.
FLOATS = {torch.float32: ("aligned", "sliced", "one of many", "images of 14"), torch.float64: ("begins oddly",)}


def together(count: int, tensor: Tensor, dim: int) -> bool:
    """Whether, of the elements along a dimension, every so many are neighbours that begin where all of them may."""
    where = _addresses(tensor)
    where = where.movedim(1, 0).flatten(1) if dim == 0 else where.movedim(1, -1)
    if where.shape[-1] % count:
        return False
    where = where.unflatten(-1, (-1, count))
    size = tensor.element_size()
    apart = (where - where[..., :1]) == size * torch.arange(count)
    return bool(apart.all()) and bool((where[..., 0] % (count * size) == 0).all())


def _addresses(tensor: Tensor) -> Tensor:
    where = torch.full((), tensor.data_ptr(), dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size) * (stride * tensor.element_size())
        where = where + steps.view(-1, *[1] * (tensor.dim() - 1 - dim))
    return where


def allowed(tensor: Tensor) -> int:
    """The widest access, in bytes: of neighbours along the rows or the classes."""
    size = tensor.element_size()
    return max(size * n for n in (1, 2, 4, 8) if n * size <= 16 and (together(n, tensor, 0) or together(n, tensor, 1)))


def widths(ptx: str, pointers: dict[int, str]) -> dict[str, list[int]]:
    """The widths of the global accesses, in bytes, by the argument that their address comes from.

    pointers: the names of the arguments that count, by their place among the parameters.
    """
    origin: dict[str, set[str]] = {}
    lines = re.findall(r"(?m)^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);", ptx)
    changed = True
    while changed:
        changed = False
        for operation, operands in lines:
            into, _, sources = operands.partition(",")
            found = {pointers[int(n)] for n in re.findall(r"_param_(\d+)", sources) if int(n) in pointers}
            if not operation.startswith(("ld.global", "st.", "setp")):
                for register in re.findall(r"%rd\d+", sources):
                    found |= origin.get(register, set())
            for register in re.findall(r"%rd\d+", into):
                if not found <= origin.get(register, set()):
                    origin.setdefault(register, set()).update(found)
                    changed = True
    accesses: dict[str, list[int]] = {}
    for operation, operands in lines:
        if operation.startswith(("ld.global", "st.global")):
            address = re.search(r"\[\s*(%rd\d+)", operands).group(1)  # type: ignore[union-attr]
            number, bits = re.search(r"(?:\.v(\d))?\.[bfsu](\d+)$", operation).groups()  # type: ignore[union-attr]
            for name in origin.get(address, set()):
                accesses.setdefault(name, []).append(int(number or 1) * int(bits) // 8)
    return accesses


def launched(name: str, input: Tensor) -> tuple[aot.Launch, dict[str, Tensor]]:
    """What loss and gradient of the input launch: the visit, and its tensors."""
    target = torch.zeros((input.shape[0], *input.shape[2:]), dtype=torch.int64)
    visits = aot.launches(
        name, lambda: mlkernels.cross_entropy(input.detach().requires_grad_(), target, backend="triton")
    )
    (visit,) = (one for one in visits if one.kernel.__name__ == "visit")
    return visit, {name: visit.arguments[name] for name in ("input", "grad")}


def ptx(one: aot.Launch) -> str:
    target = aot.TARGETS[one.target]
    backend = make_backend(target)
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    options = backend.parse_options(one.options)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for stage in ("ttir", "ttgir", "llir", "ptx"):
        made = stages[stage](made, metadata)
    return made


def parameters(one: aot.Launch) -> dict[int, str]:
    """Where, among the compiled parameters, input and gradient are."""
    found: dict[int, str] = {}
    count = 0

    def leaf(name: str, signature: Any) -> None:
        nonlocal count
        if isinstance(signature, (tuple, list)):
            for part in signature:
                leaf(name, part)
        elif signature != "constexpr":
            if name in ("input", "grad"):
                found[count] = name
            count += 1

    for name, signature in one.signature.items():
        leaf(name, signature)
    return found


def main() -> None:
    torch.set_num_threads(1)
    texts: dict[str, str] = {}
    for layout, dtype in [(name, torch.bfloat16) for name in LAYOUTS] + [(n, d) for d in FLOATS for n in FLOATS[d]]:
        one, tensors = launched("sm_90", LAYOUTS[layout](dtype))
        if one.key not in texts:
            texts[one.key] = ptx(one)
        found = widths(texts[one.key], parameters(one))
        for name, tensor in tensors.items():
            row = {"layout": layout, "dtype": str(dtype).removeprefix("torch."), "tensor": name}
            row |= {"allowed": allowed(tensor), "found": sorted(set(found[name]))}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
