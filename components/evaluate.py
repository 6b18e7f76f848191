"""TorchX component: evaluate."""

from typing import Dict, Optional

from torchx.specs import AppDef

from thresher import launch


def evaluate(
    spec: str,
    *overrides: str,
    j: Optional[str] = None,
    image: str = "thresher:latest",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    trust_model_code: bool = False,
) -> AppDef:
    """Measure every model on validation and test.

    Args:
        spec: path of the job's spec
        overrides: key=value in place of the spec's, after all options: train.epochs=3 seed=1
        j: NODESxPROCESSES; default: the spec's runtime.ranks on one node
        image: container image; local_cwd runs the installed package and ignores it
        cpu: cores a node
        gpu: GPUs a node
        memMB: main memory a node, MB
        env: environment variables: KEY=value,KEY=value
        trust_model_code: import the Python code that model.factory names
    """
    return launch.app(
        "evaluate",
        spec,
        overrides,
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memory_mb=memMB,
        env=env,
        trust_model_code=trust_model_code,
    )
