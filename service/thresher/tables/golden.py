"""Golden requests: rows of the data with the scores that the trained model gave them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from thresher.tables import strict_json

if TYPE_CHECKING:
    from thresher.tables.reader import Tables

GOLDEN = "golden.json"
TOLERANCE = 1e-5  # of a probability: torch and ONNX Runtime add in different orders; most scores differ by 1e-7
_MAX_BYTES = 16 * 2**20


def check_golden(tables: Tables) -> float:
    """Score the golden requests that lie beside tables.

    Returns:
        The largest difference to the trained model's scores.

    Raises:
        ValueError: if there are none, they cannot be scored, or a score differs by more than `TOLERANCE`.
    """
    path = tables.folder / GOLDEN
    if not path.is_file():
        raise ValueError(f"{path}: not there, so nothing says what these tables must score; export them again")
    with path.open("rb") as file:
        value = strict_json.loads(file.read(_MAX_BYTES), str(path))
    if not isinstance(value, dict) or value.keys() != {"columns", "scores"} or not isinstance(value["columns"], dict):
        raise ValueError(f"{path}: must have columns and scores, and nothing else")
    found = tables.score(value["columns"])
    try:
        expected = np.array(value["scores"], np.float64)
    except (TypeError, ValueError):
        expected = np.empty(0)
    if expected.shape != found.shape or not len(found):
        raise ValueError(f"{path}: must have a score for each of its {len(found)} rows")
    differences = np.abs(found - expected)
    if not (differences <= TOLERANCE).all():  # NaN too
        row = int(np.nan_to_num(differences, nan=np.inf).argmax())
        raise ValueError(
            f"{path}: row {row} scores {found[row]:.9g}, the trained model gave {expected[row]:.9g}: the tables, the "
            "graph or ONNX Runtime are not those that it was exported with; export again"
        )
    return float(differences.max())
