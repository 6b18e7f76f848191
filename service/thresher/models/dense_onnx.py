"""The dense part of a model as ONNX: what scores the fields' vectors without torch.

The graph holds no weights. It names those in `dense.safetensors`, by their places in that file, so that they are on
disk once, and the same graph serves every model of the same shapes.

Shapes: B samples, D columns of a field's vectors, N numeric inputs.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.tables.format import DENSE
from thresher.tables.safetensors_file import TensorSpec, header
from thresher.tables.scorer import NUMERIC_INPUT, SCORE, field_input

_NOT_NEEDED = ("metadata_props", "doc_string")  # where in the source a node comes from: paths of the exporting machine


def dense_onnx(
    model: nn.Module, fields_at: str, parts: Mapping[str, Sequence[str]], numeric: int, stored: Iterable[TensorSpec]
) -> bytes:
    """The graph, as the bytes of an ONNX file.

    Its inputs are `field.<name>` [B, D] for each field, the vectors that `Tables.embed` gives, and `numeric` [B, N]
    where there are numeric inputs; its output is `score` [B], the probability of the label 1.

    Args:
        model: any of these shapes; its weights are overwritten.
        fields_at: where the model has its fields.
        parts: by field the names of its vectors in the model, several where its vector holds one for each partition.
        numeric: number of numeric inputs N.
        stored: what `dense.safetensors` holds.

    Raises:
        Exception: of many kinds, if torch cannot export the model.
    """
    import onnxscript.optimizer

    with torch.no_grad():  # equal weights would become one
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    given = GivenVectors(model.get_submodule(fields_at), parts)
    model.set_submodule(fields_at, given)
    scored = Scored(model).eval()
    batch = torch.export.Dim("batch", min=1)
    vectors = tuple(torch.zeros(3, columns) for columns in given.columns.values())
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of torch, about itself
        program = torch.onnx.export(
            scored,
            (vectors, torch.zeros(3, numeric)),
            input_names=[*map(field_input, given.columns), NUMERIC_INPUT],
            output_names=[SCORE],
            dynamic_shapes=(tuple({0: batch} for _ in vectors), {0: batch}),
            dynamo=True,  # a trace would take one branch of a model's own `if` without a word
            optimize=False,
            verbose=False,
        )
    assert program is not None
    weights = {f"model.{spec.name}": spec for spec in stored}
    onnxscript.optimizer.optimize_ir(
        program.model,
        onnx_shape_inference=False,
        # What is computed from weights stays in the graph, which holds none; ONNX Runtime folds it when it loads.
        should_fold=lambda node: False if any(x is not None and x.name in weights for x in node.inputs) else None,
    )
    return _without_weights(program.model_proto, weights)


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What of a model without tables is stored: its parameters and persistent buffers, by name."""
    stored = model.state_dict()
    return dict(model.named_parameters()) | {name: own for name, own in model.named_buffers() if name in stored}


def _without_weights(graph_file: object, weights: Mapping[str, TensorSpec]) -> bytes:
    """The file with each weight replaced by its place in `dense.safetensors`."""
    import onnx
    from onnx.external_data_helper import set_external_data

    assert isinstance(graph_file, onnx.ModelProto)
    graph = graph_file.graph
    offsets = header(weights.values())[1]
    for tensor in graph.initializer:
        if (spec := weights.get(tensor.name)) is not None:
            assert tuple(tensor.dims) == spec.shape
            tensor.raw_data = b""  # what is moved out must be raw
            set_external_data(tensor, DENSE, offsets[spec.name], spec.nbytes)
            tensor.ClearField("raw_data")
    del graph.value_info[:]
    if len(graph.input) and not graph.input[-1].type.tensor_type.shape.dim[1].dim_value:
        del graph.input[-1]  # no numeric inputs
    for message in (graph_file, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        for field in _NOT_NEEDED:
            message.ClearField(field)
    serialized: bytes = graph_file.SerializeToString(deterministic=True)
    return serialized


class GivenVectors(Fields):
    """Stands in for a model's fields: takes their vectors instead of looking them up.

    Args:
        fields: of the model.
        parts: by field the names of its vectors.

    Attributes:
        columns: of each field's vector.
    """

    def __init__(self, fields: nn.Module, parts: Mapping[str, Sequence[str]]) -> None:
        nn.Module.__init__(self)
        assert isinstance(fields, Fields)
        self.names, self.dims = fields.names, fields.dims
        dims = dict(zip(fields.names, fields.dims, strict=True))
        self._widths = [[dims[part] for part in own] for own in parts.values()]
        self.columns = {name: sum(own) for name, own in zip(parts, self._widths, strict=True)}

    def forward(self, sparse: KeyedJaggedTensor | tuple[Tensor, ...]) -> list[Tensor]:
        """Vectors [B, D] of each field, or of each of its parts."""
        assert isinstance(sparse, tuple | list)
        found: list[Tensor] = []
        for vector_BD, widths in zip(sparse, self._widths, strict=True):
            found += vector_BD.split(widths, dim=1) if len(widths) > 1 else [vector_BD]
        return found


class Scored(nn.Module):
    """Probabilities in the place of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, vectors: tuple[Tensor, ...], numeric_BN: Tensor) -> Tensor:
        """Scores [B]."""
        return torch.sigmoid(self.model(vectors, numeric_BN))


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a library's loggers say errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
