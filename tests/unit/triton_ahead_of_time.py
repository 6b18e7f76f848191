"""Compile for a GPU that need not be there whatever a lookup and an update would launch: one JSON line a kernel.

    python -m tests.unit.triton_ahead_of_time

Run it without `TRITON_INTERPRET`. The cases of `test_triton` go through the functions that a GPU would go through, on
tensors of the processor; each launch ends when the kernel is compiled.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.unit.test_triton import FEATURE_TABLES, Case
from thresher.kernels import triton as backend
from thresher.kernels.layout import Combine, Optimizer, Shared, output_dims

TARGET = GPUTarget("cuda", 90, 32)
CASES = [
    Case(Shared.NONE, Optimizer.SGD, dims=[16, 16, 16, 16]),
    Case(Shared.TABLE, Optimizer.ADAM, torch.bfloat16, dims=[64, 128, 64, 64], mean=True, integers=torch.int32),
    Case(Shared.COLUMN, Optimizer.ROWWISE_ADAGRAD, torch.float16, weighted=True),
    Case(Shared.ROW, Optimizer.ADAGRAD, dims=[1, 1, 1, 1]),
    Case(Shared.ELEMENT, Optimizer.ADAM, dims=[1024, 8, 1000, 520]),
    Case(Shared.ROW, Optimizer.ROWWISE_ADAGRAD, combine=Combine.MULT, weighted=True),
    Case(Shared.NONE, Optimizer.ADAM, torch.float16, masked=True),
    Case(Shared.COLUMN, Optimizer.SGD, masked=True, combine=Combine.CONCAT, weighted=True),
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
        ids, offsets, weights = case.batch()
        width = sum(output_dims(case.dims, case.partitions, case.combine)[table] for table in FEATURE_TABLES)
        grad = torch.zeros((offsets.numel() - 1) // len(FEATURE_TABLES), width)
        read = [case.tensors[name] for name in ("weights", "thresholds", "mask", "starts")]
        backend.lookup(*read, ids, offsets, weights, 0.0, *case.layout())
        backend.update(
            grad, *case.tensors.values(), ids, offsets, weights, 0.0, *case.layout(), case.optimizer, 0.1, 0.0, 0.0,
            0.0, 1e-8, 1, case.weighted,
        )  # fmt: skip
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
