"""Lookup and update on CUDA devices, in Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from thresher.kernels.triton.backward import update
from thresher.kernels.triton.forward import lookup

__all__ = ["lookup", "register", "update"]


def register(library: torch.library.Library) -> None:
    """Make these the implementations of the operators for CUDA tensors."""
    for function in (lookup, update):
        library.impl(function.__name__, _on_own_device(function), "CUDA")


def _on_own_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the tensors, which need not be the current one."""

    @functools.wraps(function)
    def launch(first: torch.Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return launch
