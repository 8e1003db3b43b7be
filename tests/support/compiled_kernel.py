"""Compiles the kernel that draws signs for GPUs that are not there, and prints what its code holds, as JSON.

A process of its own, so that Triton is imported there alone, and not as its interpreter.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_dpzo.zo.triton_kernel import BFLOAT16, FLOAT32, add_signs


TYPES = ["*i32", "*i64", "*i64", "*fp32", "i32", "u64", "i64", "i64", "constexpr"]


def compile_for(capability: int, kind: int) -> dict[str, int]:
    """Return how often instructions occur in the code for a compute capability and a type of parameters."""
    signature = dict(zip(add_signs.arg_names, TYPES, strict=True))
    source = ASTSource(fn=add_signs, signature=signature, constexprs={(8,): kind}, attrs={})
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    return {name: len(re.findall(name, code)) for name in (r"\bfma\.", r"mul\.hi\.u64", r"add\.f32", r"st\.global")}


if __name__ == "__main__":
    kinds = (FLOAT32.value, BFLOAT16.value)
    sys.stdout.write(json.dumps([compile_for(capability, kind) for capability in (80, 90) for kind in kinds]))
