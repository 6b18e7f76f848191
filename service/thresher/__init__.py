"""Thresher shrinks the embedding tables of recommendation models.

What `__all__` names is the public API of the plug-in way (docs/plug-in.md), and nothing more is promised. It is
imported when it is first used: `thresher.tables.load` reads exported tables and needs NumPy alone; importing this
package imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.embedding.collection import EmbeddingBagCollection
    from thresher.embedding.representation import Dense, Masked, RowOptimizer, SoftThreshold
    from thresher.embedding.sharding import Sharder
    from thresher.kernels.layout import Optimizer
    from thresher.plugin.export import export
    from thresher.plugin.model import plan, replace
    from thresher.plugin.scheme import Scheme
    from thresher.plugin.search import Search, scheme

__all__ = [
    "Dense",
    "EmbeddingBagCollection",
    "Masked",
    "Optimizer",
    "RowOptimizer",
    "Scheme",
    "Search",
    "Sharder",
    "SoftThreshold",
    "export",
    "plan",
    "replace",
    "scheme",
]

_HOMES = {
    "embedding.collection": ["EmbeddingBagCollection"],
    "embedding.representation": ["Dense", "Masked", "RowOptimizer", "SoftThreshold"],
    "embedding.sharding": ["Sharder"],
    "kernels.layout": ["Optimizer"],
    "plugin.export": ["export"],
    "plugin.model": ["plan", "replace"],
    "plugin.scheme": ["Scheme"],
    "plugin.search": ["Search", "scheme"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"thresher.{home}"), name)
    raise AttributeError(f"module 'thresher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
