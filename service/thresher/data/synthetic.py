"""A seeded generator of clicks whose true embeddings have a known number of dimensions in each field.

The label comes from a factorization machine, the teacher: with true embeddings e_f(k) of id k in field f,

    logit = scale * sum over pairs of fields f < g of <e_f(k_f), e_g(k_g)>,   label ~ Bernoulli(sigmoid(logit)).

e_f(k) has d_f = `dimensions[f]` non-zero columns, the first d_f, uniform with variance 1; `scale` gives the logit a
standard deviation of 2. A field with d_f = 0 is noise; a column that only one field has cannot be learned, since it
meets zeros only. Ids follow a Zipf law by the inverse of its continuous form, P(k) = integral of x^-a from k+1 to k+2,
k from 0. Each sample is a function of (seed, row) alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from thresher.data.hashing import counter_bits, uniform
from thresher.data.source import BadRows, Chunk, Source
from thresher.spec import FieldSpec, SyntheticSpec

CHUNK_ROWS = 65_536
DIMENSION = 4  # planted where the spec does not say
LOGIT_DEVIATION = 2.0
LABEL_STREAM = 0
ID_STREAM = 1  # + field
EMBEDDING_STREAM = 1 << 32  # + field


@dataclass
class Synthetic(Source):
    """Columns f0, f1, … of ids, and label."""

    spec: SyntheticSpec = field(kw_only=True)
    seed: int = field(kw_only=True)

    @classmethod
    def open(cls, spec: SyntheticSpec, seed: int) -> Synthetic:
        """The generator of a spec."""
        names = [f"f{i}" for i in range(len(spec.cardinalities))]
        return cls(
            files=[],
            columns=["label", *names],
            fields={name: FieldSpec() for name in names},
            label="label",
            in_time_order=True,
            spec=spec,
            seed=seed,
        )

    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:  # noqa: ARG002 - no row is bad
        """Samples 1 to `samples`."""
        for start in range(0, self.spec.samples, CHUNK_ROWS):
            rows = np.arange(start + 1, min(start + CHUNK_ROWS, self.spec.samples) + 1, dtype=np.int64)
            ids_FN = self.ids(rows)
            label = uniform(counter_bits(self.seed, LABEL_STREAM, rows)) < 1 / (1 + np.exp(-self.logits(ids_FN)))
            columns = {"label": pa.array(label.astype(np.int8))}
            columns |= {f"f{i}": pa.array(ids) for i, ids in enumerate(ids_FN)}
            yield Chunk({name: columns[name] for name in wanted}, "synthetic", rows)

    def ids(self, rows_N: np.ndarray) -> np.ndarray:
        """Ids of every field in the given rows, int64[F, N]; small ids are the frequent ones."""
        a = self.spec.zipf
        ids_FN = np.empty((len(self.spec.cardinalities), len(rows_N)), np.int64)
        for f, n in enumerate(self.spec.cardinalities):
            u = uniform(counter_bits(self.seed, ID_STREAM + f, rows_N))
            top = n + 1.0
            x = top**u if a == 1 else (1 + u * (top ** (1 - a) - 1)) ** (1 / (1 - a))
            ids_FN[f] = np.clip(x.astype(np.int64) - 1, 0, n - 1)
        return ids_FN

    def embeddings(self, f: int, ids_N: np.ndarray) -> np.ndarray:
        """The teacher's embeddings of ids of field number f, float64[N, d_f]."""
        d = self.dimensions[f]
        counter = ids_N.astype(np.uint64)[:, None] * np.uint64(max(d, 1)) + np.arange(d, dtype=np.uint64)
        values: np.ndarray = 2 * uniform(counter_bits(self.seed, EMBEDDING_STREAM + f, counter)) - 1
        return values * 3**0.5

    def logits(self, ids_FN: np.ndarray) -> np.ndarray:
        """The teacher's logit of samples given by their ids, float64[N]."""
        dimensions = self.dimensions
        total_ND = np.zeros((ids_FN.shape[1], max(dimensions)))
        own_N = np.zeros(ids_FN.shape[1])
        for f, ids_N in enumerate(ids_FN):
            embedded = self.embeddings(f, ids_N)
            total_ND[:, : dimensions[f]] += embedded
            own_N += (embedded**2).sum(1)
        pairs = sum(min(d, e) for f, d in enumerate(dimensions) for e in dimensions[:f])  # the variance of their sum
        logits_N: np.ndarray = ((total_ND**2).sum(1) - own_N) / 2 * (LOGIT_DEVIATION / max(pairs, 1) ** 0.5)
        return logits_N

    @property
    def dimensions(self) -> list[int]:
        """Planted dimensions of each field."""
        return self.spec.dimensions or [DIMENSION] * len(self.spec.cardinalities)
