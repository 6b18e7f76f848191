"""TorchX component: the driver that runs all stages, one after the other."""

from typing import Dict, Optional

from torchx.specs import AppDef

from thresher import launch


def pipeline(
    spec: str,
    *overrides: str,
    scheduler: str = "local_cwd",
    image: str = "thresher:latest",
    cpu: int = 2,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    trust_model_code: bool = False,
) -> AppDef:
    """Run the whole pipeline: raw data in, compact tables and a report out.

    Args:
        spec: path of the job's spec
        overrides: key=value in place of the spec's, after all options: train.epochs=3 seed=1
        scheduler: where the driver starts the stages
        image: container image; local_cwd runs the installed package and ignores it
        cpu: cores of the driver, with all stages where they run beside it
        memMB: main memory of the driver, MB, with all stages where they run beside it
        env: environment variables: KEY=value,KEY=value
        trust_model_code: import the Python code that model.factory names
    """
    options = ["--scheduler", scheduler]
    return launch.app(
        "pipeline",
        spec,
        overrides,
        options=options,
        image=image,
        cpu=cpu,
        memory_mb=memMB,
        env=env,
        trust_model_code=trust_model_code,
    )
