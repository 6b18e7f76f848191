"""Whether Python code that a spec names may be imported.

A spec is data: whoever writes one must not thereby run code where it is read. Only the user who starts a job says so,
by `--trust-model-code` or the environment variable, which the processes of the job inherit and TorchX jobs are given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from thresher.spec import ModelSpec

VARIABLE = "THRESHER_TRUST_MODEL_CODE"  # 1: yes; anything else: no


def is_trusted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user of this process, or of one with this environment, trusts the code that specs name."""
    return environment.get(VARIABLE) == "1"


def trust() -> None:
    """Trust it from now on, in this process and those that it starts."""
    os.environ[VARIABLE] = "1"


def check_trust(model: ModelSpec, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a model whose code would have to be trusted, and is not.

    Raises:
        ValueError: if the spec names code, and the user has not said that it may run.
    """
    if model.factory is not None and not is_trusted(environment):
        raise ValueError(
            f"model.factory {model.factory}: the spec names Python code to run; if you trust it, add "
            f"--trust-model-code (to a TorchX component: --trust_model_code true), or set {VARIABLE}=1"
        )
