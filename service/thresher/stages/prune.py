"""Turn the search's masks into schemes: exactly the parameters that stay, a scheme for each budget."""

from __future__ import annotations

from safetensors.numpy import load_file

from thresher.methods.scheme import describe, write_scheme
from thresher.progress import Progress
from thresher.spec import Spec, budget_name, budget_params
from thresher.stages.frame import building, inputs_of, run_lease


def run(spec: Spec) -> None:
    """Write `schemes/<budget>/` for every budget.

    Raises:
        ValueError: if a mask does not hold its budget to the parameter.
    """
    with (
        run_lease(spec, "prune") as run_dir,
        Progress(run_dir.path, "prune", len(spec.prune.budgets), "budget") as progress,
    ):
        inputs = inputs_of(spec, ["prune"], search=run_dir.search)
        for done, budget in enumerate(spec.prune.budgets, start=1):
            name = budget_name(budget)
            with building("prune", run_dir.scheme(name), inputs) as work:
                if work is not None:
                    packed = load_file(run_dir.search / "masks" / f"{name}.safetensors")
                    scheme = describe(budget, spec.search.method, packed, spec.model.dim)
                    wanted = budget_params(budget, scheme["total_params"])
                    if scheme["kept_params"] != wanted:
                        raise ValueError(
                            f"{run_dir.search}: the mask for budget {name} keeps {scheme['kept_params']} parameters, "
                            f"not {wanted}; run search again"
                        )
                    write_scheme(work, scheme, packed)
            progress.update(done)
