"""A network of linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def mlp(inputs: int, hidden: Sequence[int], dropout: float, outputs: int) -> nn.Sequential:
    """Linear layers with rectifiers and dropout between them, and a linear one at the end.

    Args:
        inputs: columns of the input.
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training.
        outputs: columns of the output.
    """
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(inputs, units), nn.ReLU(), nn.Dropout(dropout)]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
