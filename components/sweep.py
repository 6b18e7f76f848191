"""TorchX component: a sweep over methods, models and seeds."""

from typing import Dict, Optional

from torchx.specs import AppDef

from thresher import launch


def sweep(
    spec: str,
    *overrides: str,
    scheduler: str = "none",
    image: str = "thresher:latest",
    cpu: int = 2,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    trust_model_code: bool = False,
) -> AppDef:
    """Run every cell of a sweep, and compare them in one table and one page.

    Args:
        spec: path of the job's spec
        overrides: key=value in place of the spec's, after all options: train.epochs=3 seed=1
        scheduler: where the stages of the cells are started; none: beside the sweep itself
        image: container image; local_cwd runs the installed package and ignores it
        cpu: cores of the sweep, with all cells where they run beside it
        memMB: main memory of the sweep, MB, with all cells where they run beside it
        env: environment variables: KEY=value,KEY=value
        trust_model_code: import the Python code that model.factory names
    """
    options = ["--scheduler", scheduler]
    return launch.app(
        "sweep",
        spec,
        overrides,
        options=options,
        image=image,
        cpu=cpu,
        memory_mb=memMB,
        env=env,
        trust_model_code=trust_model_code,
    )
