"""Compile for a GPU that need not be there whatever a lookup and an update would launch: one JSON line a kernel.

    python -m tests.unit.triton_ahead_of_time

Run it without `TRITON_INTERPRET`. Cases like those of `test_kernels` go through the functions that a GPU would go
through, on tensors of the processor; each launch ends when the kernel is compiled.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.unit.kernel_cases import Case, make_tables, train
from thresher.kernels import triton as backend
from thresher.kernels.layout import Combine, Optimizer, Shared

TARGET = GPUTarget("cuda", 90, 32)
COMPOSED: dict[str, Any] = {"rows": (13, 9, 30), "partitions": (2, 1, 7, 7, 6, 3, 1, 4, 4, 3, 12, 2, 0)}
CASES = [
    Case(dims=(16, 16, 16)),
    Case(Shared.TABLE, Optimizer.ADAM, dims=(64, 128, 64), mean=True, dtype=torch.bfloat16, index_dtype=torch.int32),
    Case(Shared.COLUMN, Optimizer.ROWWISE_ADAGRAD, weighted=True, dtype=torch.float16),
    Case(Shared.ROW, Optimizer.ADAGRAD, dims=(1, 1, 1)),
    Case(Shared.ELEMENT, Optimizer.ADAM, dims=(1024, 8, 520)),
    Case(Shared.ROW, Optimizer.ROWWISE_ADAGRAD, combine=Combine.MULT, weighted=True, **COMPOSED),
    Case(optimizer=Optimizer.ADAM, masked=True, dtype=torch.float16),
    Case(Shared.COLUMN, masked=True, combine=Combine.CONCAT, weighted=True, **COMPOSED),
]


class _Driver:
    """As much of a GPU's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def main() -> None:
    compiled: list[Any] = []
    launch = JITFunction.run

    @functools.wraps(launch)
    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        compiled.append(kernel)
        return kernel

    def every_config(call: Any, quantiles: Any) -> list[float]:
        del quantiles
        call()
        return [0.0, 0.0, 0.0]

    driver.set_active(_Driver())
    JITFunction.run = compile_only
    backend.forward._lookup_kernel._do_bench = every_config
    for case in CASES:
        train(backend, case, make_tables(case), steps=1)
    for kernel in {id(kernel): kernel for kernel in compiled}.values():
        ptx = kernel.asm["ptx"]
        found = {
            "name": kernel.metadata.name,
            "ptx_bytes": len(ptx),
            "cubin_bytes": len(kernel.asm["cubin"]),
            "wide_loads": ptx.count("ld.global.v4.b32"),
        }
        print(json.dumps(found))  # noqa: T201 - for the test that runs this


if __name__ == "__main__":
    main()
