"""The job spec: every option there is, with its unit, range and default.

One YAML file describes a job from raw data to exported tables. This file holds what a spec may say;
`specfile.py` reads one from disk and words its errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from thresher.budget import Budget, budget_name, check_budget

Granularity = Literal["global", "table", "dimension", "table_dimension", "feature", "feature_dimension"]
Positive = Annotated[int, Field(ge=1)]
# A name that is safe as a file name, a tensor name and a TorchRec table name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,62}$")]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Keys of the spec and values in their place. A file may also list them as `key=value`, which `specfile` resolves.
Overrides = Annotated[
    dict[str, Any],
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "string"}}]}),
]


class Section(BaseModel):
    """A part of the spec: unknown keys, NaN and infinities are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class FieldSpec(Section):
    """How one column of the raw data becomes one field of the model."""

    column: str | None = Field(None, description="column in the raw data; default: the field's own name")
    kind: Literal["categorical", "multi", "numeric"] = Field(
        "categorical",
        description="categorical: one id a sample. multi: a list of ids (0 or more). numeric: a number",
    )
    encoding: Literal["vocabulary", "hash"] = Field(
        "vocabulary",
        description="vocabulary: ids seen in the training split get a row each, all others share the OOV row 0. "
        "hash: ids share `rows` rows by a 64-bit hash, no vocabulary is kept",
    )
    min_count: Positive = Field(1, description="vocabulary: ids seen fewer times in training become OOV")
    rows: Positive | None = Field(None, description="hash: number of rows")
    separator: str = Field("|", min_length=1, max_length=1, description="multi: between the ids in one cell")
    numeric: Literal["log_bucket", "dense"] = Field(
        "log_bucket",
        description="numeric: log_bucket makes an id of 3 + floor(ln(x)^2) for x > 2, of floor(x) for others; "
        "dense passes ln(1 + x) of x >= 0 (x below 0 as is; a missing value as 0) to the model's dense input",
    )
    pooling: Literal["sum", "mean"] = Field("mean", description="multi: how a sample's vectors are combined")

    @model_validator(mode="after")
    def _rows_belong_to_hash(self) -> FieldSpec:
        if self.encoding == "hash" and self.rows is None:
            raise ValueError("encoding: hash needs rows: the number of rows to hash into")
        if self.encoding == "vocabulary" and self.rows is not None:
            raise ValueError("rows is for encoding: hash; remove it or set encoding: hash")
        if self.kind == "numeric" and self.encoding == "hash":
            raise ValueError("a numeric field has few buckets; remove encoding: hash")
        return self


class LabelSpec(Section):
    """What counts as a positive sample."""

    column: str | None = Field(None, description="column of the label; default: the format's own")
    positive_from: float | None = Field(
        None, description="values at or above it are 1, below it 0; default: the column holds 0 and 1"
    )
    drop: list[float] = Field([], description="samples with one of these values are left out")


class SplitSpec(Section):
    """Which samples train, validate and test."""

    by: Literal["random", "time", "column"] = Field(
        "random",
        description="random: by a hash of (seed, row number). time: oldest first into train. column: as it says",
    )
    fractions: list[float] = Field(
        [0.8, 0.1, 0.1],
        min_length=3,
        max_length=3,
        description="random and time: shares of train, validation, test; sum 1",
    )
    column: str | None = Field(None, description="time: column of the timestamp. column: column of the split")
    values: list[str | int] = Field(
        ["train", "validation", "test"],
        min_length=3,
        max_length=3,
        description="column: its values for train, validation, test",
    )

    @model_validator(mode="after")
    def _complete(self) -> SplitSpec:
        if abs(sum(self.fractions) - 1.0) > 1e-6 or min(self.fractions) <= 0:
            raise ValueError(f"fractions must be positive and sum to 1, got {self.fractions}")
        if self.by == "column" and self.column is None:
            raise ValueError("by: column needs column: the name of the column that holds the split")
        return self


class SyntheticSpec(Section):
    """The seeded generator: Zipf ids, and fields whose true embeddings have a known number of dimensions."""

    samples: Positive = Field(100_000, description="number of samples")
    cardinalities: list[Positive] = Field([1000] * 8, min_length=1, description="ids of each field")
    dimensions: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="planted effective dimensions of each field; default: all 4"
    )
    zipf: float = Field(1.1, gt=0, le=4, description="exponent of the id frequencies")

    @model_validator(mode="after")
    def _same_length(self) -> SyntheticSpec:
        if self.dimensions is not None and len(self.dimensions) != len(self.cardinalities):
            raise ValueError(
                f"dimensions has {len(self.dimensions)} entries, cardinalities {len(self.cardinalities)}: give one each"
            )
        return self


class DataSpec(Section):
    """Where the samples come from and what becomes of each column."""

    format: Literal["movielens", "criteo", "avazu", "parquet", "synthetic"] = Field(
        description="movielens reads the 100k atomic files, the 1M .dat files or the Parquet form, whichever is there; "
        "criteo the Kaggle or terabyte TSV; avazu CSV; parquet any Parquet whose columns `fields` names"
    )
    path: str | None = Field(
        None,
        description="file or folder; `package:NAME/DIR` is a folder inside an installed Python package (not imported)",
    )
    label: LabelSpec = LabelSpec()
    fields: dict[Name, FieldSpec] | None = Field(
        None, min_length=1, description="the model's fields; default: all that the format has"
    )
    split: SplitSpec = SplitSpec()
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="what to do with a row that cannot be read")
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(1000, description="skip: more bad rows than this stop the run")
    max_vocabulary: Positive = Field(
        50_000_000, description="ids of one field held in memory; beyond it, use encoding: hash"
    )
    row_group_rows: Positive = Field(65_536, description="samples a row group: the unit of reading and of the shuffle")
    synthetic: SyntheticSpec | None = None

    @model_validator(mode="after")
    def _path_or_synthetic(self) -> DataSpec:
        if self.format == "synthetic":
            if self.path is not None:
                raise ValueError("format: synthetic reads no files; remove path")
        elif self.path is None:
            raise ValueError(f"format: {self.format} needs path: the file or folder to read")
        if self.format == "parquet" and self.fields is None:
            raise ValueError("format: parquet needs fields: the columns to use")
        if self.format == "parquet" and self.label.column is None:
            raise ValueError("format: parquet needs label.column")
        return self


class ModelSpec(Section):
    """The recommendation model. Options of other models are ignored: `model.name` alone changes the model."""

    name: Literal["fm", "wide_deep", "deepfm", "autoint", "dlrm", "dcnv2"] = "deepfm"
    factory: str | None = Field(
        None,
        description="MODULE:FUNCTION: a model of your own in place of `name`, made by FUNCTION(fields, numeric, spec); "
        "imported only with --trust-model-code",
    )
    dim: Annotated[int, Field(ge=2, le=1024)] = Field(
        16,
        description="columns of every table; fm, wide_deep, deepfm: the first is the first-order weight, the others "
        "the factors",
    )
    init_scale: float = Field(0.05, gt=0, le=10, description="tables start uniform in [-init_scale, init_scale)")
    projection: Literal["narrow", "all"] = Field(
        "narrow",
        description="fm, deepfm, autoint, dlrm, which need equally wide vectors. narrow: fields whose tables have "
        "fewer columns go through a linear map of their own. all: every field does, from the identity on, so that each "
        "can keep other columns than the fields it meets (not the parts of a field under combine feature or path)",
    )
    hidden: list[Positive] = Field(
        [64, 64], description="wide_deep, deepfm, dlrm (its top network), dcnv2: widths of the hidden layers"
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="wide_deep, deepfm, dlrm, dcnv2: share of hidden units dropped in training; autoint: of attention",
    )
    attention_layers: Positive = Field(3, description="autoint: number of layers")
    attention_heads: Positive = Field(2, description="autoint: heads of a layer")
    attention_dim: Positive = Field(32, description="autoint: columns of a head")
    bottom_hidden: list[Positive] = Field(
        [64], description="dlrm: widths of the hidden layers between the numeric inputs and their vector"
    )
    cross_layers: Positive = Field(3, description="dcnv2: number of cross layers")
    cross_rank: Positive | None = Field(None, description="dcnv2: rank of their matrices; default: full")

    @property
    def title(self) -> str:
        """What the model is called in metrics and exported tables."""
        return self.factory or self.name

    @field_validator("factory")
    @classmethod
    def _names_a_function(cls, factory: str | None) -> str | None:
        if factory is not None:
            module, _, function = factory.partition(":")
            if not all(part.isidentifier() for part in [*module.split("."), function]):
                raise ValueError(
                    f"expected MODULE:FUNCTION, such as towers.two:create, found the text {factory[:60]!a}"
                )
        return factory


class TrainSpec(Section):
    """How a model is trained; search and retrain take these too where they do not set their own."""

    epochs: Positive = Field(10, description="most passes over the training split")
    batch_size: Positive = Field(1024, description="samples a step over all ranks together")
    embedding_optimizer: Literal["sgd", "rowwise_adagrad", "adagrad", "adam"] = "adam"
    embedding_learning_rate: float = Field(1e-3, gt=0)
    embedding_weight_decay: float = Field(
        1e-5, ge=0, description="L2 on the rows of the batch, added to their gradient"
    )
    dense_optimizer: Literal["adam", "adagrad"] = "adam"
    dense_learning_rate: float = Field(1e-3, gt=0)
    dense_weight_decay: float = Field(1e-5, ge=0, description="L2, added to the gradient")
    clip_norm: float | None = Field(100.0, gt=0, description="gradient norm of the dense part is cut to this")
    eval_every: Positive | None = Field(None, description="steps between validations; default: once an epoch")
    patience: Positive = Field(3, description="validations without a better AUC before training stops")
    checkpoint_every: Positive | None = Field(
        None, description="steps between resumable checkpoints; default: at every validation"
    )


Method = Literal[
    "pep",
    "magnitude",
    "sseds",
    "mde",
    "uniform",
    "remainder",
    "quotient_remainder",
    "mixed_radix",
    "chinese_remainder",
    "double_hash",
]


class SearchSpec(Section):
    """The method, and how it finds what stays. Options say which methods they are for; the others ignore them."""

    method: Method = Field(
        "pep",
        description="pep: learned soft thresholds (Liu et al. 2021). magnitude: the largest values of the uniform "
        "model. sseds: a field's number of columns, by its saliency (Qu et al. 2022). mde: by its number of rows "
        "(Ginart et al. 2021). uniform: fewer columns for all. remainder: the hashing trick. quotient_remainder, "
        "mixed_radix, chinese_remainder: complementary partitions (Shi et al. 2020). double_hash: frequent ids have "
        "a row each, others two hashed rows added",
    )
    granularity: Granularity = Field("feature_dimension", description="pep: what shares one threshold")
    threshold_init: float = Field(
        -12.0, ge=-80, le=0, description="pep: mean of s at the start; the threshold is sigmoid(s + u)"
    )
    frequency_prior: float = Field(
        1.5,
        ge=0,
        le=10,
        description="pep, feature and feature_dimension: s of a row starts lower by this times ln(1 + its occurrences "
        "in training), against the mean row",
    )
    column_prior: float = Field(
        3.0,
        ge=0,
        le=20,
        description="pep, granularities with columns: s of column j from 0 starts higher by this times ln(1 + j), "
        "against the mean column",
    )
    threshold_learning_rate: float = Field(1e-3, ge=0, description="pep: of s")
    threshold_weight_decay: float = Field(0.0, ge=0, description="pep: L2 on s, of the batch's rows")
    pressure: Literal["target", "published"] = Field(
        "target",
        description="pep, target: u follows a falling curve of kept parameters down to the smallest budget. "
        "published: u rises by the drift that published code shows, about 1e-3 a step",
    )
    epochs: Positive = Field(24, description="pep: passes over the training split")
    warmup: float = Field(0.5, ge=0, lt=1, description="pep: share of the steps before the pressure starts")
    check_every: Positive = Field(20, description="pep: steps between two counts of what is kept")
    batches: Positive = Field(1, description="sseds: batches of all ranks that the saliency is the mean of")
    rank: Literal["saliency", "per_parameter"] = Field(
        "per_parameter",
        description="sseds: columns are taken by their saliency, as published, or by saliency for each parameter, "
        "which is a column's rows",
    )
    alpha: float = Field(0.3, ge=0, le=2, description="mde: columns are proportional to rows to the power of -alpha")
    combine: Literal["concat", "add", "mult", "feature", "path"] = Field(
        "mult",
        description="partitions: how an id's buckets become its vector. feature: each is a field of its own. path: "
        "the rows of one partition go through maps that the other partitions' buckets choose",
    )
    path_hidden: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="path: width of the maps' hidden layer; 0: linear maps"
    )
    collisions: Positive | None = Field(
        None,
        description="remainder, quotient_remainder: ids that share a remainder, in place of what the budget allows; "
        "pep with these as its partitions: the same; with mixed_radix, chinese_remainder: ids to a row",
    )
    threshold: Annotated[int, Field(ge=0)] = Field(
        200,
        description="partitions, double_hash: tables with fewer rows stay as they are; with combine path also the "
        "smallest",
    )
    partitions: Literal["remainder", "quotient_remainder", "mixed_radix", "chinese_remainder"] | None = Field(
        None,
        description="pep: thresholds are learned on the rows of partitions' buckets, which are made for `collisions`, "
        "added or multiplied (`combine`), and pruned to the budget; it must not be more than the buckets have. "
        "Default: each id has a row",
    )

    @model_validator(mode="after")
    def _partitions_are_pruned(self) -> SearchSpec:
        if self.method != "pep" or self.partitions is None:
            return self
        if self.collisions is None:
            raise ValueError(
                f"partitions: {self.partitions} with method: pep needs collisions: the ids that share a row, such as 4"
            )
        if self.combine not in ("add", "mult"):
            raise ValueError(
                f"combine: {self.combine} has no learned thresholds; with method: pep and partitions take add or mult"
            )
        return self


class PruneSpec(Section):
    """How much may stay: one scheme, one retrained model and one set of tables for each budget."""

    budgets: list[Annotated[Budget, AfterValidator(check_budget)]] = Field(
        [0.5, 0.2, 0.1, 0.05],
        min_length=1,
        description="what may stay: a number below 1 is a share of the tables' parameters, a whole number from 1 up "
        'their count, a text such as "12MB" (or kB, GB, KiB, MiB, GiB, B) the bytes of all that serving needs',
    )

    @model_validator(mode="after")
    def _budgets(self) -> PruneSpec:
        if len(set(map(budget_name, self.budgets))) != len(self.budgets):
            raise ValueError(f"budgets {self.budgets}: one stands there twice")
        return self


class RetrainSpec(Section):
    """The surviving lottery ticket, trained again."""

    init: Literal["rewind", "random"] = Field(
        "rewind", description="tables start from the search's own initial values, or from new ones (the ablation)"
    )
    dense: Literal["rewind", "random", "keep"] = Field(
        "random",
        description="the dense part starts as the search's did, anew, or (keep: pep, magnitude) as it was in the model "
        "that the search trained or looked at",
    )
    epochs: Positive | None = Field(None, description="default: train.epochs")
    embedding_learning_rate: float | None = Field(None, gt=0, description="default: train's")
    embedding_weight_decay: float | None = Field(None, ge=0, description="default: train's")


class ExportSpec(Section):
    """The compact tables."""

    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="precision of the kept values")
    layout: Literal["auto", "dense", "bitmap", "bucketed"] = Field(
        "auto",
        description="form of the tables' files: auto takes the smallest of each. bucketed gives rows other numbers, "
        "and is refused for fields that are hashed or whose ids share rows; a budget in bytes allows no dense",
    )
    onnx: bool = Field(True, description="write the dense part as ONNX too: what scores and serves without torch")


class RuntimeSpec(Section):
    """Where and how the job runs."""

    run_dir: str = Field("runs/default", min_length=1, description="folder of everything the job writes")
    ranks: Annotated[int, Field(ge=1, le=4096)] = Field(2, description="processes of a training job, on all nodes")
    device: Literal["cpu", "cuda"] = "cpu"
    sharding: Literal[
        "auto",
        "table_wise",
        "row_wise",
        "column_wise",
        "table_row_wise",
        "table_column_wise",
        "grid",
        "data_parallel",
    ] = Field(
        "auto",
        description="auto lets TorchRec's planner choose a sharding for each table. table_row_wise and "
        "table_column_wise split a table over the ranks of one node, grid its columns over nodes and its rows within "
        "them; data_parallel holds every table on every rank. Where columns are split there is no granularity feature "
        "and no rowwise_adagrad; what a search left of a row is stored together, so pruned tables are then sharded as "
        "by auto",
    )
    timeout_s: Positive = Field(300, description="seconds until a collective without an answer is an error")
    parallel: Positive = Field(1, description="sweep: cells at once, each with `ranks` processes")


class SweepSpec(Section):
    """Methods × models × seeds, compared: `thresher sweep`. Budgets are those of `prune.budgets`."""

    methods: dict[Name, Overrides] = Field(
        {},
        description="a name and what its cells change of the spec, such as `pep: {search: {method: pep}}` or "
        "`random_init: [retrain.init=random]`; default: the spec's own method",
    )
    models: dict[Name, Overrides] = Field(
        {},
        description="a name and what its cells change, before what the method changes; default: the spec's own model",
    )
    seeds: list[Seed] = Field([1, 2, 3], min_length=1, description="each cell runs with each of them as `seed`")

    @model_validator(mode="after")
    def _left_to_the_sweep(self) -> SweepSpec:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: one stands there twice")
        for kind, entries in (("methods", self.methods), ("models", self.models)):
            for name, overrides in entries.items():
                runtime = overrides.get("runtime")
                keys = [*overrides, *(f"runtime.{key}" for key in (runtime if isinstance(runtime, dict) else {}))]
                for key in keys:
                    if key in ("seed", "sweep", "runtime.run_dir", "runtime.parallel"):
                        raise ValueError(f"{kind}.{name}.{key}: the same for all cells of a sweep; remove it here")
        return self


class Spec(Section):
    """A job, from raw data to compact tables."""

    data: DataSpec
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    search: SearchSpec = SearchSpec()
    prune: PruneSpec = PruneSpec()
    retrain: RetrainSpec = RetrainSpec()
    export: ExportSpec = ExportSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    sweep: SweepSpec | None = None
    seed: Seed = Field(0, description="of the split, the order of samples and the initial values")

    @model_validator(mode="after")
    def _columns_can_be_shared(self) -> Spec:
        method, dim = self.search.method, self.model.dim
        counts = {"quotient_remainder": [2], "mixed_radix": range(2, 17), "chinese_remainder": range(2, 17)}
        if self.search.combine == "concat" and all(dim % k for k in counts.get(method, [1])):
            raise ValueError(
                f"search.combine concat: model.dim {dim} columns cannot be shared evenly by "
                f"{'2' if method == 'quotient_remainder' else '2 to 16'} partitions; take an even model.dim, or "
                "combine add or mult"
            )
        return self

    @model_validator(mode="after")
    def _products_stay_together(self) -> Spec:
        search, sharding = self.search, self.runtime.sharding
        thresholds_on_products = search.method == "pep" and search.partitions and search.combine == "mult"
        if thresholds_on_products and sharding in ("row_wise", "table_row_wise", "grid"):
            raise ValueError(
                f"runtime.sharding {sharding}: rows that have thresholds and are multiplied must be on one rank; "
                "take auto, table_wise, column_wise or data_parallel, or search.combine add"
            )
        return self

    @model_validator(mode="after")
    def _dense_part_fits(self) -> Spec:
        if self.retrain.dense == "keep" and self.search.method not in ("pep", "magnitude"):
            raise ValueError(
                "retrain.dense keep: is for the methods pep and magnitude, which have a dense part for what they leave "
                f"of the tables; with {self.search.method} take rewind or random"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_be_renumbered(self) -> Spec:
        hashed = [name for name, field in (self.data.fields or {}).items() if field.encoding == "hash"]
        if self.export.layout == "bucketed" and hashed:
            raise ValueError(
                f"export.layout bucketed: gives rows other numbers, but those of {hashed[0]} are hashes; take auto"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Spec:
        if self.train.batch_size % self.runtime.ranks:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} must be a multiple of runtime.ranks {self.runtime.ranks}"
            )
        return self
