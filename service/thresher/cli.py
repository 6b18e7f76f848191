"""The command line: `thresher STAGE --spec FILE [key=value …]`.

Every option of a job is in its spec; the command line only names the file and overrides keys of it. Stages are
imported when they run: `thresher --help`, `validate` and `prepare` need no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

STAGES = {
    "prepare": "Read the raw data once; write columnar shards, vocabularies and counts.",
    "train": "Train the uniform model: the baseline.",
    "search": "Learn which parameters may stay under each budget.",
    "prune": "Write each budget's scheme: per table, exactly the parameters that stay.",
    "retrain": "Train what stays under each budget again.",
    "export": "Write compact tables for serving.",
    "evaluate": "Score the baseline and every budget's model; write metrics.json.",
    "report": "Write report.html: accuracy against bytes.",
}
# Those that build a model, which may be the user's own.
MODEL_STAGES = frozenset({"train", "search", "retrain", "export", "evaluate"})

SpecOption = Annotated[
    Path, typer.Option("--spec", metavar="FILE", help="The job's spec, in YAML.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace keys of the spec: train.epochs=3.", show_default=False),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-model-code",
        help="Import the Python code that model.factory names; so does THRESHER_TRUST_MODEL_CODE=1 in the environment.",
    ),
]

app = typer.Typer(
    name="thresher",
    help="Shrinks the embedding tables of recommendation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its boxes hide the traceback from job logs
)


def main() -> None:
    """Run the command line: exit code 0, 2 for a mistake of the user's, 1 for anything else that went wrong."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("thresher"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _mistakes_told() -> Iterator[None]:
    """Show a `ValueError` of ours alone: it names what, where and the mend. Others keep their traceback."""
    try:
        yield
    except ValueError as error:
        if not _raised_in_thresher(error):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _raised_in_thresher(error: ValueError) -> bool:
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__package__")).partition(".")[0] == "thresher"


def _run_stage(stage: str, spec: Path, overrides: list[str] | None) -> None:
    from thresher.specfile import load_spec
    from thresher.trust import check_trust

    with _mistakes_told():
        resolved = load_spec(spec, overrides or ())
        if stage in MODEL_STAGES:
            check_trust(resolved.model)
        importlib.import_module(f"thresher.stages.{stage}").run(resolved)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(spec: SpecOption, overrides: Overrides = None) -> None:
        _run_stage(stage, spec, overrides)

    def model_command(spec: SpecOption, overrides: Overrides = None, trust_model_code: TrustOption = False) -> None:
        _trust(trust_model_code)
        _run_stage(stage, spec, overrides)

    return model_command if stage in MODEL_STAGES else command


def _trust(wanted: bool) -> None:
    if wanted:
        from thresher.trust import trust

        trust()


for _name, _help in STAGES.items():
    app.command(_name, help=_help)(_stage_command(_name))


@app.command()
def pipeline(
    spec: SpecOption,
    overrides: Overrides = None,
    scheduler: Annotated[str, typer.Option(help="TorchX scheduler that runs the stages.")] = "local_cwd",
    trust_model_code: TrustOption = False,
) -> None:
    """Run all stages in order; skip what is done, continue what was cut off."""
    _trust(trust_model_code)
    with _mistakes_told():
        importlib.import_module("thresher.pipeline").run(spec, overrides or [], scheduler)


@app.command()
def sweep(
    spec: SpecOption,
    overrides: Overrides = None,
    scheduler: Annotated[str, typer.Option(help="TorchX scheduler of the cells' stages; none: this machine.")] = "none",
    trust_model_code: TrustOption = False,
) -> None:
    """Run methods × models × seeds of a spec; compare them in one table and one page."""
    _trust(trust_model_code)
    with _mistakes_told():
        importlib.import_module("thresher.sweep").run(spec, overrides or [], scheduler)


TablesFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Exported tables: RUN/tables/BUDGET.")]


@app.command()
def score(
    folder: TablesFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="Samples, in the columns of the raw data.")],
) -> None:
    """Score samples: a line for each, the probability of the label 1. Needs no torch."""
    from thresher.data.parquet import parquet_chunks, parquet_columns
    from thresher.tables import load

    with _mistakes_told():
        tables = load(folder)
        wanted = tables.sources
        if missing := sorted(set(wanted) - set(parquet_columns(file))):
            raise ValueError(f"{file}: has no column {missing[0]}; the model reads {', '.join(wanted)}")
        for chunk in parquet_chunks([file], wanted):
            typer.echo("\n".join(f"{value:.9g}" for value in tables.score(chunk.columns).tolist()))


@app.command()
def lookup(
    folder: TablesFolder,
    field: Annotated[str, typer.Argument(metavar="FIELD", help="Name of a field.")],
    keys: Annotated[list[str], typer.Argument(metavar="KEY", help="Raw keys, as the data have them.")],
) -> None:
    """Show the id of each key, and what its row kept: column=value. Needs no torch."""
    from thresher.tables import load

    with _mistakes_told():
        tables = load(folder)
        ids, vectors = tables.rows(field, keys), tables.lookup(field, keys)
        for key, found, vector in zip(keys, ids.tolist(), vectors, strict=True):
            kept = " ".join(f"{column}={vector[column]:.6g}" for column in vector.nonzero()[0])
            unknown = ", unknown" if found == tables.fields[field].oov_row else ""
            typer.echo(f"{key}: id {found}{unknown}, {len(kept.split())} of {len(vector)} columns: {kept or 'none'}")


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory whose stages are done.")],
    budget: Annotated[str, typer.Argument(metavar="BUDGET", help="Which of its tables: 0.1; baseline.")],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of published models.")],
    keep: Annotated[int, typer.Option(min=0, help="Versions that stay beside the current one.")] = 3,
) -> None:
    """Make exported tables the version that servers of a folder serve."""
    from thresher import rundir
    from thresher.serve.card import model_card
    from thresher.serve.publication import publish as published
    from thresher.tables import load

    with _mistakes_told():
        tables = rundir.RunDir(run).tables(budget)
        for path in (tables, run / "metrics.json", run / "spec.json"):
            if not path.exists():
                raise ValueError(
                    f"{path}: not there; give a run directory whose stages are done, and one of its budgets"
                )
        metrics, spec = rundir.read_json(run / "metrics.json"), rundir.read_json(run / "spec.json")
        version = published(tables, model_card(load(tables, verify=False).manifest, metrics, spec["data"]), to, keep)
    typer.echo(f"{to}: version {version} is current")


@app.command()
def serve(
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Published models, or exported tables.")],
    name: Annotated[str, typer.Option(help="Of the model, in URLs; default: the folder's name.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    max_rows: Annotated[int, typer.Option(min=1, help="Most samples of a request.")] = 8192,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request's body.")] = 16 * 2**20,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests at work at once.")] = 64,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds until a request must have come.")] = 10.0,
) -> None:
    """Serve scores over HTTP: Open Inference Protocol 2, metrics, and a page for people. Needs no torch."""
    with _mistakes_told():
        try:
            from thresher.serve import server
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install thresher[serve]") from None
        from thresher.serve.limits import Limits

        limits = Limits(rows=max_rows, body_bytes=max_body_bytes, requests=max_requests, seconds=timeout_s)
        server.run(model, name or model.resolve().name, host, port, limits)


@app.command()
def validate(
    spec: SpecOption,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="Also look whether the raw data fit the spec.")] = False,
) -> None:
    """Say whether a spec can run; list all its errors if not."""
    from thresher.budget import budget_name
    from thresher.cells import pairs
    from thresher.specfile import SpecError, load_spec

    with _mistakes_told():
        read = load_spec(spec, overrides or ())
        if data and (differences := importlib.import_module("thresher.data.prepare").check(read)):
            raise SpecError([f"{spec}: {difference}" for difference in differences])
    budgets = ", ".join(map(budget_name, read.prune.budgets))
    cells = f"; a sweep of {len(pairs(read)) * len(read.sweep.seeds)} cells" if read.sweep else ""
    typer.echo(
        f"OK: {spec}: {read.data.format} data, {read.model.title} of dimension {read.model.dim}, {read.search.method} "
        f"to budgets {budgets}, {read.runtime.ranks} ranks on {read.runtime.device}, into {read.runtime.run_dir}"
        f"{cells}"
    )


@app.command()
def inspect(folder: TablesFolder) -> None:
    """Show what a folder of compact tables holds: tables, layouts, bytes, fields."""
    with _mistakes_told():
        importlib.import_module("thresher.tables.inspect").show(folder)


@app.command()
def verify(folder: TablesFolder) -> None:
    """Check every byte of a folder of compact tables: hashes, sizes, structure."""
    from thresher.tables import load

    with _mistakes_told():
        tables = load(folder, verify=True)
    typer.echo(f"OK: {folder}: {len(tables.tables)} tables, {len(tables.fields)} fields, {tables.total_bytes:,} bytes")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As tables for people: docs/spec.md.")] = False,
) -> None:
    """Print the JSON Schema of specs, for editors and other tools."""
    from thresher.spec import Spec
    from thresher.specdoc import spec_markdown

    typer.echo(spec_markdown() if markdown else json.dumps(Spec.model_json_schema(), indent=2), nl=not markdown)


if __name__ == "__main__":
    main()
