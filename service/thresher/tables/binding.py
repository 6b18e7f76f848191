"""Binding of the lookup core that `setup.py` builds from `native/`, by ctypes; where it is not there, NumPy looks up.

The core checks what a table holds and looks up; names, types and shapes of tensors are checked here.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.tables import layouts
from thresher.tables.layouts import Arrays, Bags, Floats, Ids, Shape, Table
from thresher.tables.values import STORED

_ABI = 1
_LAYOUTS = ("dense", "bitmap", "bucketed")
_DTYPES = tuple(STORED)
INSTRUCTIONS = ("portable", "avx2", "avx512", "neon")


class _Parts(ctypes.Structure):
    """`thresher_parts`."""

    _fields_ = (
        ("layout", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_uint64),
        ("dim", ctypes.c_uint64),
        ("kept", ctypes.c_uint64),
        ("records", ctypes.c_void_p),
        ("record_bytes", ctypes.c_uint64),
        ("index", ctypes.c_void_p),
        ("index_bytes", ctypes.c_uint64),
        ("scales", ctypes.c_void_p),
        ("scale_bytes", ctypes.c_uint64),
    )


class _Bags(ctypes.Structure):
    """`thresher_bags`."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("id_count", ctypes.c_uint64),
        ("offsets", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_uint64),
        ("mean", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The core, or None where it was not built, which is said once."""
    path = Path(__file__).parent / "_tables.so"
    try:
        found = ctypes.CDLL(str(path))
        if found.thresher_tables_abi() != _ABI:
            raise OSError("of another version")
    except (OSError, AttributeError) as error:
        reason = "not there" if not path.is_file() else str(error)
        warnings.warn(
            f"thresher was installed without its C++ lookup core ({path.name}: {reason}), so tables are read with "
            "NumPy, many times slower; with a C++17 compiler there, run "
            "`pip install --force-reinstall --no-deps thresher`",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    found.thresher_table_open.restype = ctypes.c_void_p
    found.thresher_table_open.argtypes = (ctypes.POINTER(_Parts), ctypes.c_char_p, ctypes.c_uint64)
    found.thresher_table_close.argtypes = (ctypes.c_void_p,)
    found.thresher_table_close.restype = None
    numbers = ctypes.POINTER(ctypes.c_uint64)
    found.thresher_lookup.argtypes = (ctypes.POINTER(_Bags), ctypes.c_uint64, ctypes.c_uint64, numbers, numbers)
    return found


def table_of(arrays: Arrays, shape: Shape, where: str) -> Table:
    """The table that a file holds, checked; by the core where it is there.

    Raises:
        ValueError: names `where`, the tensor, and what it must be.
    """
    core = library()
    return layouts.table_of(arrays, shape, where) if core is None else NativeTable(core, arrays, shape, where)


class NativeTable:
    """A table that the core looks up in.

    Attributes:
        dim: D.
        handle: of the open table.

    Raises:
        ValueError: if the arrays are no table of this shape; names `where`.
    """

    def __init__(self, core: ctypes.CDLL, arrays: Arrays, shape: Shape, where: str) -> None:
        """Check a mapped table, and keep it mapped."""
        layouts.check_shapes(arrays, shape, where)
        self.dim = shape.dim
        self._core = core
        self._arrays = arrays
        names = {"dense": ("values", ""), "bitmap": ("records", "present"), "bucketed": ("records", "bucket_rows")}
        records, index, scales = (arrays.get(name, _NONE) for name in (*names[shape.layout], "scales"))
        parts = _Parts(
            _LAYOUTS.index(shape.layout), _DTYPES.index(shape.dtype), shape.rows, shape.dim, shape.kept,
            _address(records), records.nbytes, _address(index), index.nbytes, _address(scales), scales.nbytes,
        )  # fmt: skip
        error = ctypes.create_string_buffer(200)
        self.handle = core.thresher_table_open(ctypes.byref(parts), error, len(error))
        if not self.handle:
            raise ValueError(f"{where}: {error.value.decode()}")
        weakref.finalize(self, core.thresher_table_close, self.handle)

    def lookup(self, ids_L: Ids) -> Floats:
        """Vectors `[L, D]` of rows that are within the table; of id -1, which is none, zeros."""
        return pooled([Bags(self, ids_L)])[0]


class OutsideError(ValueError):
    """An id is outside its table.

    Attributes:
        bags: its place among the bags of the call.
        position: its place among their ids.
    """

    def __init__(self, bags: int, position: int) -> None:
        super().__init__(f"id {position} of bags {bags} is outside of its table")
        self.bags = bags
        self.position = position


def pooled(every: Sequence[Bags]) -> list[Floats]:
    """Vectors `[B, D]` of bags of the same B samples, in one call of the core.

    Args:
        every: bags of tables that the core has open; arrays are C-contiguous.

    Raises:
        OutsideError: if an id is neither -1 nor within its table.
    """
    samples = every[0].samples if every else 0
    structs, found = (_Bags * len(every))(), []
    for struct, bags in zip(structs, every, strict=True):
        table = bags.table
        assert isinstance(table, NativeTable)
        assert bags.samples == samples
        out_BD = np.empty((samples, table.dim), np.float32)
        struct.table = table.handle
        struct.ids, struct.id_count = _address(bags.ids_L), len(bags.ids_L)
        struct.offsets = None if bags.offsets is None else _address(bags.offsets)
        struct.weights = None if bags.weights_L is None else _address(bags.weights_L)
        struct.out, struct.out_stride, struct.mean = _address(out_BD), table.dim, bags.mean
        found.append(out_BD)
    core = library()
    assert core is not None
    number, position = ctypes.c_uint64(), ctypes.c_uint64()
    status = core.thresher_lookup(structs, len(every), samples, ctypes.byref(number), ctypes.byref(position))
    if status == 1:
        raise OutsideError(number.value, position.value)
    if status:
        raise ValueError(f"bags {number.value}: offsets must rise from 0 to the number of ids")
    return found


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


_NONE = np.empty(0, np.uint8)
