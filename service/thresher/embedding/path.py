"""Vectors along a path: rows of one partition, put through maps that the other partitions' buckets choose.

e = M_k,p_k(x) ∘ … ∘ M_2,p_2(x) (W[p_1(x)]) (`path` of Shi et al., KDD 2020). W and the maps are small by nature, and
are ordinary parameters of the dense part, alike on every rank.

Shapes: L ids, B bags, D columns, m_j buckets of partition j, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torchrec.sparse.jagged_tensor import JaggedTensor

from thresher.embedding.partitions import Partitions

_NOISE = 0.1  # standard deviation of what a map adds to the identity at the start, for a vector of variance 1


@dataclass(frozen=True)
class BucketPath:
    """The path of one field.

    Attributes:
        partitions: of its ids; W has a row for each bucket of the first, each other bucket has a map.
        hidden: units of the maps' hidden layer; 0 for linear maps.
        mean: whether bags are pooled by their mean.
    """

    partitions: Partitions
    hidden: int
    mean: bool

    @property
    def rows(self) -> int:
        """Rows of W."""
        return self.partitions.splits[0][1]

    @property
    def map_parameters(self) -> list[list[str]]:
        """Names of the parameters of the maps of each partition but the first, as `PathTable` has them."""
        own = ["inner", "bias", "outer"] if self.hidden else ["weight"]
        return [[f"maps.{number}.{name}" for name in own] for number in range(len(self.partitions) - 1)]

    def params(self, dim: int) -> int:
        """Parameters of W and of all maps."""
        maps = sum(modulus for _, modulus in self.partitions.splits[1:])
        return self.rows * dim + maps * map_params(dim, self.hidden)


def map_params(dim: int, hidden: int) -> int:
    """Parameters of one map: a matrix, or two and the hidden layer's bias."""
    return 2 * dim * hidden + hidden if hidden else dim * dim


class PathTable(nn.Module):
    """W and the maps of one field. At the start the vectors have about the variance of a plain table's.

    Args:
        path: of the field.
        dim: columns D.
        init_scale: W starts uniform in [-init_scale, init_scale).
    """

    def __init__(self, path: BucketPath, dim: int, init_scale: float) -> None:
        super().__init__()
        self.path = path
        self.table = nn.Parameter(torch.empty(path.rows, dim).uniform_(-init_scale, init_scale))
        self.maps = nn.ModuleList(
            Perceptrons(modulus, dim, path.hidden) if path.hidden else Linears(modulus, dim)
            for _, modulus in path.partitions.splits[1:]
        )

    def forward(self, bags: JaggedTensor) -> Tensor:
        """Pooled vectors [B, D]: a bag's ids have their vectors first."""
        ids_L, lengths_B = bags.values().long(), bags.lengths().long()
        (divisor, modulus), *others = self.path.partitions.splits
        vectors_LD = embedding(ids_L // divisor % modulus, self.table)
        for own, (divisor, modulus) in zip(self.maps, others, strict=True):
            vectors_LD = own(vectors_LD, ids_L // divisor % modulus)
        pooled_BD = torch.segment_reduce(vectors_LD, "sum", lengths=lengths_B, axis=0, unsafe=True)
        return pooled_BD / lengths_B.clamp(min=1).unsqueeze(1) if self.path.mean else pooled_BD


class Linears(nn.Module):
    """A matrix for each bucket, near the identity at the start.

    Args:
        buckets: how many.
        dim: columns D of the vectors.
    """

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        noise = torch.empty(buckets, dim, dim).uniform_(-1, 1) * _NOISE * (3 / dim) ** 0.5
        self.weight = nn.Parameter((torch.eye(dim) + noise) / (1 + _NOISE**2) ** 0.5)

    def forward(self, vectors_LD: Tensor, buckets_L: Tensor) -> Tensor:
        """Mapped vectors [L, D]."""
        return _times(self.weight, buckets_L, vectors_LD)


class Perceptrons(nn.Module):
    """z + outer · relu(inner · z + bias) for each bucket; what is added to z is small at the start.

    Args:
        buckets: how many.
        dim: columns D of the vectors.
        hidden: units H.
    """

    def __init__(self, buckets: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(buckets, hidden, dim).uniform_(-1, 1) * (3 / dim) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(buckets, hidden))
        # relu halves the mean square, which the factor 2 makes up for
        self.outer = nn.Parameter(torch.empty(buckets, dim, hidden).uniform_(-1, 1) * _NOISE * (2 * 3 / hidden) ** 0.5)

    def forward(self, vectors_LD: Tensor, buckets_L: Tensor) -> Tensor:
        """Mapped vectors [L, D]."""
        hidden_LH = (_times(self.inner, buckets_L, vectors_LD) + embedding(buckets_L, self.bias)).relu()
        return vectors_LD + _times(self.outer, buckets_L, hidden_LH)


def _times(matrices: Tensor, buckets_L: Tensor, vectors_LD: Tensor) -> Tensor:
    """Each vector times the matrix of its bucket. An embedding's gradient is deterministic, that of indexing is not."""
    chosen = embedding(buckets_L, matrices.flatten(1)).view(-1, *matrices.shape[1:])
    return torch.bmm(chosen, vectors_LD.unsqueeze(2)).squeeze(2)
