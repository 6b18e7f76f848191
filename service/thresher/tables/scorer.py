"""Scores from vectors: the dense part, run by ONNX Runtime. Shapes: B samples, D columns of a field's vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NUMERIC_INPUT = "numeric"
SCORE = "score"


def field_input(name: str) -> str:
    """Name of the graph's input of a field's vectors: no field can have that of the numeric inputs."""
    return f"field.{name}"


class Scorer:
    """The dense part of exported tables; any number of threads may use it at once.

    Args:
        path: the ONNX file; its weights are in `dense.safetensors` beside it.
        columns: of each field's vectors, as the tables give them.
        numeric: number of numeric inputs.

    Raises:
        ValueError: if ONNX Runtime is not installed, refuses the file, or its inputs are not these.
    """

    def __init__(self, path: Path, columns: Mapping[str, int], numeric: int) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ValueError("scoring needs ONNX Runtime; install it: pip install thresher[serve]") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # requests are spread over threads; within one, more made small ones slower
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base
            raise ValueError(f"{path}: ONNX Runtime refuses it: {str(error)[:500]}") from None
        expected = {field_input(name): ["tensor(float)", width] for name, width in columns.items()}
        if numeric:
            expected[NUMERIC_INPUT] = ["tensor(float)", numeric]
        found = {own.name: [own.type, *own.shape[1:]] for own in self._session.get_inputs()}
        outputs = [(own.name, own.type, len(own.shape)) for own in self._session.get_outputs()]
        if found != expected or outputs != [(SCORE, "tensor(float)", 1)]:
            raise ValueError(
                f"{path}: has inputs {str(found)[:300]} and outputs {str(outputs)[:100]}; for these tables it must "
                f"have {str(expected)[:300]} and {SCORE}"
            )
        self._numeric = bool(numeric)

    def score(
        self, vectors: Mapping[str, npt.NDArray[np.float32]], numeric_BN: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Scores `[B]`: probabilities of the label 1.

        Args:
            vectors: `[B, D]` of each field.
            numeric_BN: numeric inputs.
        """
        feed: dict[str, Any] = {field_input(name): vector_BD for name, vector_BD in vectors.items()}
        if self._numeric:
            feed[NUMERIC_INPUT] = numeric_BN
        scores: npt.NDArray[np.float32] = self._session.run([SCORE], feed)[0]
        return scores
