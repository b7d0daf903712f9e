"""Compiles every Triton kernel as it is launched, for NVIDIA GPUs that need not be there; prints what came out.

    python tests/compiled_kernels.py            # compute capabilities 8.0 and 9.0: a line per variant; three minutes
    python tests/compiled_kernels.py --few      # of one size: a minute

Run in a process of its own, without Triton's interpreter. A launch is intercepted: what would be launched is compiled.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from turbovlm.ops import fused, kernels, partition_tokens
from turbovlm.ops.kernels import attention, similarity

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
CAPABILITIES = (80, 90)


def compile_for(capability: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What Triton's launcher would compile for these arguments."""
    names = kernel.arg_names
    values = dict(zip(names, args)) | {name: options.pop(name) for name in list(options) if name in names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> str:
    """Registers, bytes spilled, and instructions in loops that do not hold others, as the driver's tools tell."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    told = f", {found.get('REG')} registers, {found.get('STACK')} bytes of stack"
    loops = innermost_loops(code)
    if not loops:
        return told
    spilled = sum("LDL" in line or "STL" in line for loop in loops for line in loop)
    return f"{told}, loops of {', '.join(str(len(loop)) for loop in loops)} instructions, {spilled} on the stack"


def innermost_loops(code: str) -> list[list[str]]:
    """The instructions from where a branch leads back to that branch."""
    lines = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", code)]
    loops: list[list[str]] = []
    last = -1
    for address, line in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if target and last < int(target[1], 16) < address:
            loops.append([line for place, line in lines if int(target[1], 16) <= place <= address])
            last = address
    return loops


def main() -> None:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for capability in CAPABILITIES:
            compiled = compile_for(capability, kernel, args, dict(options))
            what = {name: value for name, value in options.items() if name.isupper()}
            told = f"{compiled.metadata.shared} bytes shared{resources(compiled.asm['cubin'])}"
            print(f"{kernel.fn.__name__} sm_{capability} {what}: {told}", flush=True)

    JITFunction.run = run
    for module in (attention, similarity):
        if hasattr(module, "interpreted"):
            module.interpreted = lambda x: False
    torch.set_grad_enabled(False)
    sizes = [(577, 16, 64), (1370, 6, 64), (729, 16, 72), (1025, 16, 88), (4096, 10, 128)]
    widths = [32, 40, 64, 72, 80, 88, 96, 128]
    if sys.argv[1:] == ["--few"]:
        sizes, widths = sizes[2:3], [72, 128]
    for head_dim in widths:
        for batch in (1, 64):
            shape = 3, batch, 16, 577, head_dim
            q, k, v = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            kernels.biased_attention(q, k, v, torch.empty(batch, 1, 1, 577, device="meta"), 0.1)
    for tokens, heads, head_dim in sizes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32)[: None if tokens < 1000 else 1]:
            everything(tokens, heads, head_dim, dtype)
    for tokens in (16384,) if len(sizes) > 1 else ():
        everything(tokens, 2, 64, torch.bfloat16)


def everything(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """One launch of each kernel, of each kind that it has."""
    q, k, v = torch.zeros(2, tokens, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    bias, x = torch.zeros(2, 1, 1, tokens), torch.zeros(2, tokens, heads * head_dim, dtype=dtype)
    weights = torch.ones(2, tokens)
    if dtype == torch.float16:
        kernels.biased_attention(q, k, v, bias, 0.1)
    for added, content, guides, shares in ((None, None, (0, 1), None), (bias, v, (1, tokens), weights)):
        rows, squares = fused.attention_rows(q, k, added, guides=guides, weights=shares, content=content, scale=0.1)
    features, own = k.transpose(1, 2).flatten(2), similarity.BUSY
    for kind, busy in (("all", 1), ("random", own), ("alternate", 1 << 30)):  # 64 candidates, some, 16
        partition, similarity.BUSY = partition_tokens(tokens, 1, kind), busy
        hidden = weights == 0 if kind == "all" else None
        redundancy, nearest = fused.most_similar(features, partition, hidden, squares if kind == "all" else None)
        for degree in ("weighted_distance", "weighted_difference", "redundancy"):
            how = {"degree": degree, "alpha": 0.3, "seed": 0, "padding": None, "r": 17}
            _, e, _ = fused.rank(redundancy, nearest, rows, partition, 0, **how)
        src, dst = fused.choose(e, nearest, partition, 17)
    similarity.BUSY = own
    for reduce, known in (("merge", None), ("keep_norm", weights), ("prune", weights)):
        kernels.merge_tokens(x, known, src, dst, None, reduce)
    if tokens <= kernels.MOST_TAKEN_FROM and dtype == torch.bfloat16:
        take_in_turn(tokens)
    bag = torch.zeros(2 * tokens, dtype=torch.int64)
    kernels.mean_of_bags(x, bag, bag[: tokens + 1], weights.flatten())
    for update, samples in ((True, 32), (True, 0), (False, 24)):
        kernels.merge_books(src, dst, min(tokens, kernels.MOST_BOOKED), update)
        kernels.restore(x, x[:, 17:], x[:, 17:], bag, update, samples, 0.3)


def take_in_turn(tokens: int) -> None:
    """The kernel of greedy choices, of each kind."""
    cosines, even = torch.zeros(2, tokens, tokens), torch.ones(2, tokens)
    for by, added, until in (("coverage", even.double(), None), ("dpp", even, None), ("mmr", even, 0.5)):
        kernels.take_in_turn(cosines, even, even, added, 17, by, until, 1, 0.0 if by == "mmr" else 1e-3, 1e-3, 1e-3)


if __name__ == "__main__":
    main()
