"""Ids of exported tables, for the ids that a model was trained with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thresher.data.vocabulary import read_keys
from thresher.tables import Tables


def exported_ids(exported: Tables, data: Path, name: str, ids: np.ndarray) -> np.ndarray:
    """Ids of a field, as the exported tables number them: they may have renumbered the rows of vocabularies."""
    field, keys = exported.fields[name], read_keys(data / "vocabulary" / f"{name}.parquet")
    if keys is None or field.composition is not None:
        return ids
    texts = [str(key) for key in keys]
    return np.concatenate([[field.oov_row], exported._vocabularies[name].rows(texts, name)])[ids]
