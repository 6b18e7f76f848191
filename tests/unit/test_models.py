"""Models against formulas written out by hand, one sample at a time."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.models.autoint import AutoInt
from thresher.models.dcnv2 import DCNv2
from thresher.models.deepfm import DeepFM
from thresher.models.dlrm import DLRM
from thresher.models.fields import Fields
from thresher.models.fm import FM
from thresher.models.wide_deep import WideDeep
from thresher.spec import ModelSpec
from thresher.train.build import MODELS, create_model

ROWS = {"user": 6, "item": 5, "genres": 4}
# The ids of each sample; genres has any number of them, of which it takes the mean.
BAGS = {
    "user": [[0], [3], [5], [1], [0]],
    "item": [[4], [4], [0], [2], [1]],
    "genres": [[0, 2], [1], [], [3, 3, 0], [2]],
}
SAMPLES = range(5)
MIXED = {"user": 4, "item": 2, "genres": 1}


def alike(dim: int) -> dict[str, int]:
    return dict.fromkeys(ROWS, dim)


def plan(dims: dict[str, int], dim: int = 16) -> TablePlan:
    return TablePlan(dim, {name: FieldTable(own) for name, own in dims.items()})


def tables(dims: dict[str, int]) -> EmbeddingBagCollection:
    """TorchRec's own collection, in another order than the model's: models must index by key."""
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=name,
                feature_names=[name],
                num_embeddings=ROWS[name],
                embedding_dim=dims[name],
                pooling=PoolingType.MEAN if name == "genres" else PoolingType.SUM,
            )
            for name in reversed(ROWS)
        ]
    )


def batch(numeric: int) -> tuple[KeyedJaggedTensor, Tensor]:
    bags = [bag for name in ROWS for bag in BAGS[name]]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        keys=list(ROWS),
        values=torch.tensor([i for bag in bags for i in bag]),
        lengths=torch.tensor([len(bag) for bag in bags]),
    )
    return sparse, torch.randn(len(SAMPLES), numeric)


def made(name: str, dims: dict[str, int], numeric: int, **options: object) -> nn.Module:
    """A model none of whose parameters is zero."""
    torch.manual_seed(len(name) + numeric)
    small = {"dim": 4, "hidden": [6, 3], "attention_dim": 3, "bottom_hidden": [5]}
    spec = ModelSpec.model_validate({"name": name} | small | options)
    model = create_model(spec, tables(dims), plan(dims, spec.dim), numeric)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def vectors(fields: Fields, sample: int) -> list[Tensor]:
    """The fields' vectors of one sample, id by id."""
    found = []
    for name in ROWS:
        table = fields.embeddings.embedding_bags[name].weight  # type: ignore[union-attr, index]
        total = torch.zeros(table.shape[1])
        for row in BAGS[name][sample]:
            total = total + table[row]
        vector = total / max(1, len(BAGS[name][sample]))
        found.append(fields.projections[name].weight @ vector if name in fields.projections else vector)
    return found


def network(layers: nn.Sequential, inputs: Tensor) -> Tensor:
    """Linear layers with rectifiers between them."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        inputs = torch.clamp(layer.weight @ inputs + layer.bias, min=0)
    return (linear[-1].weight @ inputs + linear[-1].bias)[0]


def fm_by_hand(model: FM, x: list[Tensor], numeric: Tensor) -> Tensor:
    total = model.bias[0] + sum(vector[0] for vector in x)
    for first, second in itertools.combinations(x, 2):
        total = total + torch.dot(first[1:], second[1:])
    return total if model.numeric is None else total + numeric @ model.numeric.weight[0]


def deepfm_by_hand(model: DeepFM, x: list[Tensor], numeric: Tensor) -> Tensor:
    return fm_by_hand(model, x, numeric) + network(model.deep, torch.cat([*(vector[1:] for vector in x), numeric]))


def wide_deep_by_hand(model: WideDeep, x: list[Tensor], numeric: Tensor) -> Tensor:
    wide = model.bias[0] + sum(vector[0] for vector in x)
    if model.numeric is not None:
        wide = wide + numeric @ model.numeric.weight[0]
    assert model.deep is not None
    return wide + network(model.deep, torch.cat([*(vector[1:] for vector in x), numeric]))


def autoint_by_hand(model: AutoInt, x: list[Tensor], numeric: Tensor) -> Tensor:
    if model.numeric_ND is not None:
        x = x + [value * vector for value, vector in zip(numeric, model.numeric_ND, strict=True)]
    for layer in model.layers:
        queries, keys, values, residual = layer.weight.chunk(4)  # type: ignore[union-attr, operator]
        width = len(queries) // model.heads
        after = []
        for attending in x:
            heads = []
            for head in range(model.heads):
                rows = slice(head * width, (head + 1) * width)
                scores = [torch.dot(queries[rows] @ attending, keys[rows] @ other) / math.sqrt(width) for other in x]
                total = sum(torch.exp(score) for score in scores)
                shares = [torch.exp(score) / total for score in scores]
                heads.append(sum(share * (values[rows] @ other) for share, other in zip(shares, x, strict=True)))
            after.append(torch.clamp(torch.cat(heads) + residual @ attending, min=0))  # type: ignore[arg-type]
        x = after
    return (model.output.weight @ torch.cat(x) + model.output.bias)[0]


def dlrm_by_hand(model: DLRM, x: list[Tensor], numeric: Tensor) -> Tensor:
    beside = []
    if model.bottom is not None:
        bottom = numeric
        for layer in model.bottom.modules():
            if isinstance(layer, nn.Linear):
                bottom = torch.clamp(layer.weight @ bottom + layer.bias, min=0)
        x, beside = [bottom, *x], [bottom]
    products = [torch.dot(first, second) for first, second in itertools.combinations(x, 2)]
    return network(model.top, torch.cat([*beside, torch.stack(products)]))


def dcnv2_by_hand(model: DCNv2, x: list[Tensor], numeric: Tensor) -> Tensor:
    x_0 = x_l = torch.cat([*x, numeric])
    parameters = dict(model.cross.named_parameters())
    for layer in itertools.count():
        if f"bias.{layer}" not in parameters:
            return network(model.deep, x_l)
        if f"kernels.{layer}" in parameters:
            w = parameters[f"kernels.{layer}"]
        else:
            w = parameters[f"W_kernels.{layer}"] @ parameters[f"V_kernels.{layer}"]
        x_l = x_0 * (w @ x_l + parameters[f"bias.{layer}"].flatten()) + x_l
    raise AssertionError


BY_HAND = {
    "fm": fm_by_hand,
    "wide_deep": wide_deep_by_hand,
    "deepfm": deepfm_by_hand,
    "autoint": autoint_by_hand,
    "dlrm": dlrm_by_hand,
    "dcnv2": dcnv2_by_hand,
}
OPTIONS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in BY_HAND),
    ("autoint", {"attention_layers": 1, "attention_heads": 3, "attention_dim": 5}),
    ("dlrm", {"bottom_hidden": []}),
    ("dcnv2", {"cross_layers": 2, "cross_rank": 2, "hidden": []}),
]


def test_every_name_of_a_spec_is_a_model() -> None:
    assert list(MODELS) == list(get_args(ModelSpec.model_fields["name"].annotation)) == list(BY_HAND)


@pytest.mark.parametrize("numeric", [0, 2])
@pytest.mark.parametrize("dims", [alike(4), MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_model_is_its_formula(name: str, options: dict[str, object], dims: dict[str, int], numeric: int) -> None:
    model = made(name, dims, numeric, **options)
    sparse, dense = batch(numeric)
    expected = [BY_HAND[name](model, vectors(model.fields, b), dense[b]) for b in SAMPLES]  # type: ignore[operator]
    torch.testing.assert_close(model(sparse, dense), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_models_that_need_equal_widths_project(name: str) -> None:
    fields: Fields = made(name, MIXED, 1).fields  # type: ignore[assignment]
    if name in ("wide_deep", "dcnv2"):
        assert fields.dims == [4, 2, 1]
        assert list(fields.projections) == []
    else:
        assert fields.dims == [4, 4, 4]
        assert list(fields.projections) == ["item", "genres"]  # user is 4 wide as it is


@pytest.mark.parametrize("name", ["fm", "deepfm", "autoint", "dlrm"])
def test_projections_of_all_fields_change_nothing_at_the_start(name: str) -> None:
    torch.manual_seed(1)
    collection, inputs = tables(alike(4)), batch(0)
    spec = ModelSpec.model_validate({"name": name, "dim": 4, "projection": "all"})
    model = create_model(spec, collection, plan(alike(4), 4), 0).eval()
    assert list(model.fields.projections) == list(ROWS)  # type: ignore[union-attr, arg-type]
    expected = collection(inputs[0])
    for field, vectors_BD in zip(ROWS, model.fields(inputs[0]), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(vectors_BD, expected[field])
    model(*inputs).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("numeric", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name: str, numeric: int) -> None:
    """A parameter without a gradient stops DistributedDataParallel."""
    model = made(name, MIXED, numeric)
    model(*batch(numeric)).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_are_the_seeds(name: str) -> None:
    def parameters(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model = create_model(ModelSpec(name=name), nn.Identity(), plan(alike(16)), 3)  # type: ignore[arg-type]
        return list(model.parameters())

    for first, again in zip(parameters(7), parameters(7), strict=True):
        assert torch.equal(first, again)
    assert any(not torch.equal(first, other) for first, other in zip(parameters(7), parameters(8), strict=True))


class Given(nn.Module):
    """Takes pooled vectors [B, Σ D] for ids: what is exported is the model alone."""

    def forward(self, sparse: Tensor) -> KeyedTensor:
        return KeyedTensor(list(MIXED), list(MIXED.values()), sparse)


@pytest.mark.parametrize("numeric", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_can_be_exported_for_any_batch_size(name: str, numeric: int) -> None:
    torch.manual_seed(0)
    model = create_model(ModelSpec(name=name), Given(), plan(MIXED), numeric).eval()  # type: ignore[arg-type]

    def inputs(samples: int) -> tuple[Tensor, Tensor]:
        return torch.randn(samples, sum(MIXED.values())), torch.randn(samples, numeric)

    samples = torch.export.Dim("samples", min=2)
    shapes = ({0: samples}, {0: samples})
    exported = torch.export.export(model, inputs(3), dynamic_shapes=shapes).module()
    others = inputs(7)
    torch.testing.assert_close(exported(*others), model(*others))


@pytest.mark.parametrize("numeric", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_can_be_traced(name: str, numeric: int) -> None:
    """TorchRec's pipelines trace a model with torch.fx."""
    model = create_model(ModelSpec(name=name), Given(), plan(MIXED), numeric)  # type: ignore[arg-type]
    inputs = torch.randn(3, sum(MIXED.values())), torch.randn(3, numeric)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*inputs), model(*inputs))


def test_wide_deep_over_single_columns_is_wide() -> None:
    model = made("wide_deep", alike(1), 0)
    assert list(dict(model.named_children())) == ["fields"]
    sparse, dense = batch(0)
    expected = [model.bias[0] + sum(vectors(model.fields, b))[0] for b in SAMPLES]  # type: ignore[arg-type, index]
    torch.testing.assert_close(model(sparse, dense), torch.stack(expected))


def test_dlrm_needs_a_pair() -> None:
    with pytest.raises(ValueError, match=r"model\.name dlrm: .* one field and no numeric input; give data\.fields one"):
        create_model(ModelSpec(name="dlrm"), nn.Identity(), plan({"user": 4}), 0)
    assert isinstance(create_model(ModelSpec(name="dlrm"), nn.Identity(), plan({"user": 4}), 1), DLRM)


def test_dropout_acts_in_training_alone() -> None:
    for name in ("wide_deep", "deepfm", "autoint", "dlrm", "dcnv2"):
        model = made(name, MIXED, 2, dropout=0.5)
        inputs = batch(2)
        assert not torch.equal(model(*inputs), model(*inputs))
        model.eval()
        assert torch.equal(model(*inputs), model(*inputs))
