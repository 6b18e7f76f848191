"""The public API on one rank: what it replaces, searches and exports, and the words of its refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import thresher
from thresher import tables
from thresher.embedding.partitions import Partitions
from thresher.embedding.representation import Composed, Representation
from thresher.kernels.layout import Combine

ROWS = {"a": 40, "b": 9, "c": 30}
DIMS = {"a": 4, "b": 6, "c": 4}
ADAM = thresher.RowOptimizer(learning_rate=0.05)
SOFT = thresher.SoftThreshold(init=-6.0)
TOTAL = sum(ROWS[name] * DIMS[name] for name in ROWS)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(name: str, **changes: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        **{
            "name": name, "feature_names": [name], "num_embeddings": ROWS[name], "embedding_dim": DIMS[name],
            "pooling": PoolingType.MEAN if name == "b" else PoolingType.SUM,
        } | changes
    )  # fmt: skip


class TwoTowers(nn.Module):
    """Two collections, of which one stands in two places, and a dense part."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        device = torch.device("meta")
        self.left = EmbeddingBagCollection([config("a", **changes), config("b")], device=device)
        self.right = nn.ModuleList([EmbeddingBagCollection([config("c")], device=device)])
        self.again = self.right
        self.over = nn.Linear(sum(DIMS.values()), 1)
        self.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        left, right = self.left(features), self.right[0](features)
        result: torch.Tensor = self.over(torch.cat([left["a"], left["b"], right["c"]], dim=1))
        return result


def features(seed: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    return KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.cat([torch.randint(0, rows, (32,), generator=generator) for rows in ROWS.values()]),
        lengths=torch.ones(96, dtype=torch.int64),
    )


def sharded(representation: Any, **changes: Any) -> DistributedModelParallel:
    model = thresher.replace(TwoTowers(**changes), representation, ADAM, seed=3, init_scale=0.5)
    plan = thresher.plan(model, batch_size=32)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[thresher.Sharder()])


def train(model: nn.Module, steps: int, search: thresher.Search | None = None, first: int = 0) -> None:
    for step in range(first, first + steps):
        (model(features(step)).sigmoid() - step % 2).square().mean().backward()
        if search is not None:
            search.step()


def vectors(model: nn.Module) -> dict[str, np.ndarray]:
    """What the model looks up for each row of each table."""
    found = {}
    for module in (model.module.left, model.module.right[0]):
        for table in module._embedding_bag_configs:
            rows = table.num_embeddings
            lengths = torch.cat([torch.full((rows,), int(name == table.name)) for name in ROWS])
            with torch.no_grad():
                out = module(KeyedJaggedTensor(list(ROWS), torch.arange(rows), lengths=lengths))
                found[table.name] = out[table.name].numpy()
    return found


def exported(folder: Path) -> dict[str, np.ndarray]:
    read = tables.load(folder)
    ids = {name: (np.arange(rows), np.arange(rows + 1)) for name, rows in ROWS.items()}
    return read.embed(ids)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, thresher, thresher.tables, thresher.cli; assert not {'torch', 'torchrec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_that_is_promised_is_there_and_has_a_docstring() -> None:
    assert sorted(thresher.__all__) == dir(thresher) == thresher.__all__
    for name in thresher.__all__:
        assert getattr(thresher, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = thresher.nothing


def test_every_collection_is_replaced_in_every_place() -> None:
    model = TwoTowers()
    theirs = model.left.embedding_bag_configs()
    assert thresher.replace(model, {"a": SOFT, "b": thresher.Dense(), "c": SOFT}, ADAM) is model
    assert isinstance(model.left, thresher.EmbeddingBagCollection)
    assert isinstance(model.right[0], thresher.EmbeddingBagCollection)
    assert model.again[0] is model.right[0]
    assert model.left.embedding_bag_configs() == theirs
    assert model.left.representations == {"a": SOFT, "b": thresher.Dense()}
    assert model.left.optimizer is ADAM
    assert isinstance(thresher.replace(TwoTowers().left, SOFT), thresher.EmbeddingBagCollection)


class Subclass(EmbeddingBagCollection):
    pass


def theirs(**arguments: Any) -> nn.Module:
    return nn.ModuleDict({"tables": EmbeddingBagCollection([config("a")], device=torch.device("meta"), **arguments)})


@pytest.mark.parametrize(
    ("model", "representation", "message"),
    [
        (nn.Linear(1, 1), SOFT, "the model has no torchrec.EmbeddingBagCollection"),
        (theirs(is_weighted=True), SOFT, "tables: its features have sample or position weights"),
        (nn.ModuleList([Subclass([config("a")])]), SOFT, "0: is a Subclass, which may do more"),
        (thresher.replace(TwoTowers(), SOFT), SOFT, "left: was replaced already"),
        (nn.ModuleList([theirs(), theirs()]), SOFT, "table a: two collections have one of this name"),
        (theirs(), {"a": SOFT, "x": SOFT}, "representation of table x: there is no such table; there are a"),
        (TwoTowers(), {"a": SOFT, "b": SOFT}, "table c has no representation"),
        (TwoTowers(data_type=DataType.INT8), SOFT, "table a: trains in INT8; take FP32, FP16 or BF16"),
        (TwoTowers(need_pos=True), SOFT, "table a: position weights"),
        (TwoTowers(), {"a": SOFT, "b": SOFT, "c": thresher.SoftThreshold()}, "there are 2 different SoftThresholds"),
        (TwoTowers(), thresher.SoftThreshold("global"), "granularity global shares thresholds by all tables"),
        (TwoTowers(), thresher.SoftThreshold("dimension"), "2 collections; take table_dimension"),
    ],
)
def test_what_cannot_be_replaced_is_left_alone_and_named(model: nn.Module, representation: Any, message: str) -> None:
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(message)):
        thresher.replace(model, representation)
    assert dict(model.named_modules()) == before


def test_a_sharded_model_is_refused() -> None:
    model = DistributedModelParallel(
        TwoTowers(), device=torch.device("cpu"), sharders=[EmbeddingBagCollectionSharder()]
    )
    with pytest.raises(ValueError, match="is sharded already; replace collections before DistributedModelParallel"):
        thresher.replace(model, SOFT)


def test_a_plan_needs_replaced_collections() -> None:
    with pytest.raises(ValueError, match=r"call thresher\.replace"):
        thresher.plan(TwoTowers(), batch_size=4)
    with pytest.raises(ValueError, match="table a, sharding column_wise: granularity feature"):
        thresher.plan(thresher.replace(TwoTowers(), thresher.SoftThreshold("feature")), 4, sharding="column_wise")


@pytest.mark.parametrize("granularity", ["table", "table_dimension", "feature", "feature_dimension"])
def test_a_search_holds_every_budget_exactly(granularity: Any, tmp_path: Path) -> None:
    model = sharded(thresher.SoftThreshold(granularity, init=-6.0))
    counts = {"a": np.arange(40)}
    search = thresher.Search(model, [0.5, 60], total_steps=30, counts=counts, column_prior=2.0, check_every=5)
    train(model, 30, search)
    for budget, params in [(0.5, TOTAL // 2), (60, 60)]:
        scheme = thresher.scheme(search, budget)
        assert scheme.budget == budget
        assert sum(map(scheme.kept, ROWS)) == params
        assert scheme.packed("b", 2, 3).shape == (3, 1)
    assert [entry["step"] for entry in search.history] == [5, 10, 15, 20, 25, 30]
    assert search.history[-1]["pressure"] > 0
    search.step()  # beyond its steps it presses no further
    assert len(search.history) == 6
    # All tables as they are, with what stays of them.
    thresher.export(model, tmp_path / "tables", scheme=scheme, dtype="fp32")
    assert tables.load(tmp_path / "tables").manifest.budget == 60
    kept = {name: np.unpackbits(scheme.masks[name], axis=1, count=DIMS[name], bitorder="little") for name in ROWS}
    found, expected = exported(tmp_path / "tables"), vectors(model)
    for name in ROWS:
        np.testing.assert_allclose(found[name], expected[name] * kept[name], rtol=1e-5, atol=1e-7)


def test_replicated_thresholds_learn_by_the_users_optimizer() -> None:
    model = sharded(thresher.SoftThreshold("table", init=-3.0))
    learned = {name: p for name, p in model.named_parameters() if "shared_thresholds" in name}
    assert len(learned) == 3
    train(model, 1, thresher.Search(model, [0.5], total_steps=5))
    assert all(p.grad is not None for p in learned.values())


def test_an_interrupted_search_continues() -> None:
    whole, first = sharded(SOFT), sharded(SOFT)
    search = thresher.Search(whole, [0.5, 0.1], total_steps=40, check_every=2)
    train(whole, 40, search)
    begun = thresher.Search(first, [0.5, 0.1], total_steps=40, check_every=2)
    train(first, 34, begun)
    state = begun.state_dict()
    assert list(state["masks"]) == ["0.5"]
    second = sharded(SOFT)
    resumed = thresher.Search(second, [0.5, 0.1], total_steps=40, check_every=2)
    for mine, other in zip(kernels(second), kernels(first), strict=True):
        for name in ("weights", "thresholds", "seen", "step"):
            getattr(mine, name).copy_(getattr(other, name))
        for name in ("weight_states", "threshold_states"):
            for to, value in zip(getattr(mine, name), getattr(other, name), strict=True):
                to.copy_(value)
    second.module.over.load_state_dict(first.module.over.state_dict())
    resumed.load_state_dict(state)
    assert [own.pressure for own in kernels(second)] == [own.pressure for own in kernels(first)]
    train(second, 6, resumed, first=34)
    for budget in (0.5, 0.1):
        expected, found = thresher.scheme(search, budget), thresher.scheme(resumed, budget)
        assert all(np.array_equal(found.masks[name], expected.masks[name]) for name in ROWS)


def kernels(model: Any) -> list[Any]:
    return [kernel.group for own in (model.module.left, model.module.right[0]) for kernel in own.kernels()]


def test_a_scheme_is_saved_trained_and_exported(tmp_path: Path) -> None:
    model = sharded({"a": SOFT, "b": thresher.Dense(), "c": SOFT})
    train(model, 10)
    scheme = thresher.scheme(model, 0.25)
    assert set(scheme.masks) == {"a", "c"}
    assert scheme.kept("a") + scheme.kept("c") == (40 * 4 + 30 * 4) // 4
    scheme.save(tmp_path / "scheme")
    again = thresher.Scheme.load(tmp_path / "scheme")
    assert again.budget == 0.25
    assert all(np.array_equal(again.masks[name], scheme.masks[name]) for name in ("a", "c"))

    masked = thresher.Masked(again)
    retrained = sharded({"a": masked, "b": thresher.Dense(), "c": masked})
    train(retrained, 10)
    keys = {"a": [f"key {row}" for row in range(1, 40)]}
    thresher.export(retrained, tmp_path / "tables", dtype="fp32", vocabularies=keys, name="towers")
    read, found = tables.load(tmp_path / "tables"), exported(tmp_path / "tables")
    for name, expected in vectors(retrained).items():
        assert np.array_equal(found[name], expected)
    assert {name: read.tables[name].kept for name in ROWS} == {
        "a": scheme.kept("a"), "b": 9 * 6, "c": scheme.kept("c"),
    }  # fmt: skip
    assert (read.manifest.model, read.manifest.seed, read.manifest.budget) == ("towers", 3, 0.25)
    assert read.rows("a", ["key 7", "unknown"]).tolist() == [7, 0]
    assert read.rows("c", [7, 29]).tolist() == [7, 29]
    with pytest.raises(ValueError, match="field c: id 30 at position 1 is outside"):
        read.rows("c", [7, 30])
    assert read.fields["b"].pooling == "mean"
    assert set(read.dense) == {"over.weight", "over.bias", "scale"}
    np.testing.assert_array_equal(read.dense["over.weight"], retrained.module.over.weight.detach().numpy())


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_narrow_data_types_are_exported(data_type: DataType, tmp_path: Path) -> None:
    model = sharded(thresher.Dense(), data_type=data_type)
    thresher.export(model, tmp_path / "tables", dtype="fp32")
    assert np.array_equal(exported(tmp_path / "tables")["a"], vectors(model)["a"])


COMPOSED = Composed(dict.fromkeys(ROWS, Partitions.remainder(4)), Combine.ADD)
OTHER = thresher.Scheme({"a": np.zeros((39, 1), np.uint8)})


@pytest.mark.parametrize(
    ("representation", "arguments", "message"),
    [
        (SOFT, {}, "table a: learned thresholds; export it with the scheme"),
        (SOFT, {"scheme": OTHER}, "table a: the scheme has a mask (39, 1) of it, not (40, 1)"),
        (COMPOSED, {}, "table a: composed tables are exported by jobs alone; train the model by a spec"),
        (thresher.Dense(), {"vocabularies": {"x": []}}, "vocabulary of feature x: there is no such feature"),
        (thresher.Dense(), {"vocabularies": {"b": ["k"] * 9}}, "9 keys have rows 1 to 9, but table b has 9 rows"),
        (thresher.Dense(), {"name": ""}, "model: must be a printable string"),
    ],
)
def test_what_cannot_be_exported_is_named(
    representation: Representation, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        thresher.export(sharded(representation), tmp_path / "tables", **arguments)
    assert not list(tmp_path.glob("tables/*"))


@pytest.mark.parametrize(
    ("feature_names", "message"),
    [(["x-y"], "'x-y': names of tables and features must be"), (["b"], "feature b: is looked up in 2 tables")],
)
def test_names_that_do_not_fit_are_refused(feature_names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        thresher.export(sharded(thresher.Dense(), feature_names=feature_names), tmp_path / "tables")


def test_an_export_needs_an_empty_folder_and_sharded_tables(tmp_path: Path) -> None:
    (tmp_path / "left").touch()
    with pytest.raises(ValueError, match="holds left already"):
        thresher.export(sharded(thresher.Dense()), tmp_path)
    with pytest.raises(ValueError, match="export what DistributedModelParallel gave"):
        thresher.export(thresher.replace(TwoTowers(), SOFT), tmp_path)


def test_what_a_search_cannot_do_is_named() -> None:
    model = sharded(SOFT)
    for budgets, steps in [([], 5), ([0.5], 0)]:
        with pytest.raises(ValueError, match="a search needs one at least of each"):
            thresher.Search(model, budgets, steps)
    with pytest.raises(ValueError, match="choose a budget that keeps 1"):
        thresher.Search(model, [10**6], 5)
    search = thresher.Search(model, [0.5], total_steps=5)
    with pytest.raises(ValueError, match=re.escape("budget 0.2: the search has 0.5")):
        thresher.scheme(search, 0.2)
    with pytest.raises(ValueError, match=re.escape("budget 0.5: not reached after 0 of 5 steps")):
        thresher.scheme(search, 0.5)
    for source in (sharded(thresher.Dense()), nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="no table of the model learns thresholds"):
            thresher.scheme(source, 0.5)


def test_a_scheme_names_what_it_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table b: the scheme has none; it has a"):
        OTHER.packed("b", 0, 1)
    with pytest.raises(ValueError, match="table b: the scheme has none; it has a"):
        OTHER.kept("b")
    with pytest.raises(ValueError, match="table a: the scheme has 39 rows of it, but the table needs 40"):
        OTHER.packed("a", 0, 40)
    with pytest.raises(ValueError, match="no such file"):
        thresher.Scheme.load(tmp_path / "none")
