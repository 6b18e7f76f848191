"""Exported tables made by hand, of a model whose scores NumPy gives too; and their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from thresher.tables import Writer, load
from thresher.tables.format import DENSE
from thresher.tables.golden import GOLDEN
from thresher.tables.safetensors_file import TensorSpec, header
from thresher.tables.scorer import field_input

USERS = np.array([10, 20, 30, 40, 50], np.int64)
GENRES = ["Action", "Drama", "Film-Noir", "Komödie"]
COLUMNS: dict[str, list[Any]] = {
    "user_id": [10, 20, 30, 99, 50],
    "city": ["Oslo", "Köln", "", "Oslo", "x"],
    "genres": ["Action|Drama", "", "Komödie", "Nothing|Film-Noir", "Drama"],
    "age": [18.0, 33.0, None, 0.0, -2.0],
}
DIM = 4
_CITIES = 7


def write_export(folder: Path, seed: int = 0) -> Path:
    """Tables of a logistic regression over three fields and a number, whose weights are drawn by a seed."""
    random = np.random.default_rng(seed)
    tables = {
        name: np.round(random.normal(size=(rows, DIM)), 3).astype(np.float32)
        for name, rows in (("user", len(USERS) + 1), ("city", _CITIES), ("genres", len(GENRES) + 1))
    }
    mask = random.random(tables["user"].shape) < 0.4
    mask[1:, 0] = True  # keys that keep nothing leave the vocabulary
    tables["user"] *= mask
    weight = random.normal(size=(1, 3 * DIM + 1)).astype(np.float32)
    writer = Writer(folder, model="logistic", seed=seed, budget=0.4, spec_fingerprint="0" * 64)
    for name, values in tables.items():
        masked = name == "user"
        by_kept = np.bincount(mask.sum(axis=1), minlength=DIM + 1).tolist() if masked else [0] * DIM + [len(values)]
        with writer.table(name, dim=DIM, rows_by_kept=by_kept, dtype="fp32", renumber=masked) as table:
            table.write(values, mask if masked else None)
    writer.field("user", table="user", kind="categorical", encoding="vocabulary", keys=USERS, column="user_id")
    writer.field("city", table="city", kind="categorical", encoding="hash")
    writer.field(
        "genres", table="genres", kind="multi", encoding="vocabulary", pooling="mean", keys=GENRES, separator="|"
    )
    dense = {"weight": weight, "bias": np.array([0.1], np.float32)}
    writer.dense(dense)
    writer.graph(_graph(dense), {"age": None})
    writer.finish()
    scores = expected_scores(tables, weight, load(folder).rows("city", COLUMNS["city"]))
    (folder / GOLDEN).write_text(json.dumps({"columns": COLUMNS, "scores": scores.tolist()}))
    return folder


def expected_scores(tables: dict[str, np.ndarray], weight: np.ndarray, cities: np.ndarray) -> np.ndarray:
    """Scores of COLUMNS, computed without the tables' reader but for the hash."""
    found = []
    for user, city, genres, age in zip(COLUMNS["user_id"], cities, COLUMNS["genres"], COLUMNS["age"], strict=True):
        user_id = USERS.tolist().index(user) + 1 if user in USERS else 0
        bag = [GENRES.index(key) + 1 if key in GENRES else 0 for key in genres.split("|") if key]
        pooled = tables["genres"][bag].mean(axis=0) if bag else np.zeros(DIM)
        number = 0.0 if age is None else np.log1p(age) if age >= 0 else age
        x = np.concatenate([tables["user"][user_id], tables["city"][city], pooled, [number]])
        found.append(1 / (1 + np.exp(-(weight[0].astype(np.float64) @ x + 0.1))))
    return np.array(found)


def _graph(dense: dict[str, np.ndarray]) -> bytes:
    offsets = header(TensorSpec(name, array.dtype, array.shape) for name, array in dense.items())[1]
    weights = []
    for name, array in dense.items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape, raw_data=b"")
        set_external_data(tensor, DENSE, offsets[name], array.nbytes)
        tensor.ClearField("raw_data")
        weights.append(tensor)
    inputs = [*map(field_input, ("user", "city", "genres")), "numeric"]
    graph = helper.make_graph(
        [
            helper.make_node("Concat", inputs, ["x"], axis=1),
            helper.make_node("Gemm", ["x", "weight", "bias"], ["logit"], transB=1),
            helper.make_node("Sigmoid", ["logit"], ["probability"]),
            helper.make_node("Flatten", ["probability"], ["flat"], axis=1),
            helper.make_node("Squeeze", ["flat", "one"], ["score"]),
        ],
        "dense",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1 if name == "numeric" else DIM])
            for name in inputs
        ],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])],
        [*weights, helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    serialized: bytes = made.SerializeToString()
    return serialized
