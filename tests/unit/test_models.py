"""Models against formulas written out by hand."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from thresher.models.deepfm import DeepFM
from thresher.models.fields import Fields
from thresher.models.fm import FM
from thresher.spec import ModelSpec

FIELDS = ["user", "item", "genres"]


class Given(nn.Module):
    """Gives fixed vectors by field, in another order than the model's: models must index by key."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, sparse: object) -> dict[str, Tensor]:
        del sparse
        return dict(reversed(self.vectors.items()))


def fields(vectors: dict[str, Tensor]) -> Fields:
    """The fields that have these vectors."""
    return Fields(Given(vectors), {field: vectors[field].shape[1] for field in FIELDS})


def pairwise(vectors: dict[str, Tensor], sample: int) -> Tensor:
    """First-order weights and all pairs of factors, one by one."""
    total = sum(vectors[field][sample, 0] for field in FIELDS)
    for first, second in itertools.combinations(FIELDS, 2):
        total = total + torch.dot(vectors[first][sample, 1:], vectors[second][sample, 1:])
    return torch.as_tensor(total)


def test_fm_is_all_pairs() -> None:
    torch.manual_seed(0)
    vectors = {field: torch.randn(5, 4) for field in FIELDS}
    numeric = torch.randn(5, 2)
    model = FM(fields(vectors), 2, ModelSpec(name="fm"))
    nn.init.normal_(model.bias)
    expected = [
        model.bias[0] + pairwise(vectors, b) + numeric[b] @ model.numeric.weight[0]
        for b in range(5)  # type: ignore[union-attr]
    ]
    torch.testing.assert_close(model(None, numeric), torch.stack(expected))


def test_fm_without_numeric_inputs() -> None:
    vectors = {field: torch.randn(3, 4) for field in FIELDS}
    model = FM(fields(vectors), 0, ModelSpec(name="fm"))
    expected = torch.stack([pairwise(vectors, b) for b in range(3)])
    torch.testing.assert_close(model(None, torch.empty(3, 0)), expected)


def test_deepfm_adds_a_network_over_factors_and_numeric_inputs() -> None:
    torch.manual_seed(1)
    vectors = {field: torch.randn(5, 4) for field in FIELDS}
    numeric = torch.randn(5, 2)
    model = DeepFM(fields(vectors), 2, ModelSpec(name="deepfm", hidden=[6]))
    first, _, _, last = model.deep
    for b in range(5):
        inputs = torch.cat([*(vectors[field][b, 1:] for field in FIELDS), numeric[b]])
        hidden = torch.relu(first.weight @ inputs + first.bias)
        deep = last.weight[0] @ hidden + last.bias[0]
        linear = numeric[b] @ model.numeric.weight[0]  # type: ignore[union-attr]
        expected = model.bias[0] + pairwise(vectors, b) + linear + deep
        torch.testing.assert_close(model(None, numeric)[b], expected)
