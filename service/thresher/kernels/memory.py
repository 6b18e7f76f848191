"""Memory for tables: in huge pages where the system gives them.

A lookup reads random rows, and with pages of 4 KB the address of nearly each of them must be looked up in memory too.
With pages of 2 MB a step on tables larger than the caches takes 5 to 15 % less.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # Linux: transparent huge pages on request, for systems whose setting is `madvise`


def empty(entries: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """A flat tensor, not yet filled; only memory that nobody has touched becomes huge pages."""
    tensor = torch.empty(entries, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and sys.platform == "linux":
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        last = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        if last > first:  # a wish: where it is not granted, nothing is lost but time
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
    return tensor


def zeros(entries: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The same, filled with zeros."""
    return empty(entries, dtype, device).zero_()
