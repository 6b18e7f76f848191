"""TorchX component: prune."""

from typing import Dict, Optional

from torchx.specs import AppDef

from thresher import launch


def prune(
    spec: str,
    *overrides: str,
    image: str = "thresher:latest",
    cpu: int = 2,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
) -> AppDef:
    """Choose, for each budget, the parameters that stay.

    Args:
        spec: path of the job's spec
        overrides: key=value in place of the spec's, after all options: train.epochs=3 seed=1
        image: container image; local_cwd runs the installed package and ignores it
        cpu: cores a node
        memMB: main memory a node, MB
        env: environment variables: KEY=value,KEY=value
    """
    return launch.app("prune", spec, overrides, image=image, cpu=cpu, memory_mb=memMB, env=env)
