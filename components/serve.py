"""TorchX component: a server."""

from typing import Dict, Optional

from torchx.specs import AppDef

from thresher import launch


def serve(
    model: str,
    *options: str,
    port: int = 8080,
    image: str = "thresher:latest",
    cpu: int = 1,
    memMB: int = 2048,
    env: Optional[Dict[str, str]] = None,
) -> AppDef:
    """Serve the current version of published models over HTTP.

    Args:
        model: folder of published models
        options: further options of `thresher serve`, after all others: --host=0.0.0.0 --name=clicks
        port: to listen on
        image: container image; local_cwd runs the installed package and ignores it
        cpu: cores
        memMB: main memory, MB
        env: environment variables: KEY=value,KEY=value
    """
    return launch.server(model, options, port=port, image=image, cpu=cpu, memory_mb=memMB, env=env)
