"""The user's own model: made by a function that the spec names, and imported only if the user trusts it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from thresher.models.fields import Fields
from thresher.spec import ModelSpec
from thresher.trust import check_trust

Factory = Callable[[Fields, int, ModelSpec], nn.Module]


def imported(spec: ModelSpec) -> Factory:
    """The function that `model.factory` names.

    Args:
        spec: of a model with a factory.

    Raises:
        ValueError: if the user does not trust it, or there is none of that name.
    """
    check_trust(spec)
    assert spec.factory is not None
    module_name, _, name = spec.factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise ValueError(
            f"model.factory {spec.factory}: no module {error.name} on the Python path; install it, or put its folder "
            "on PYTHONPATH"
        ) from None
    if not hasattr(module, name):
        raise ValueError(
            f"model.factory {spec.factory}: {module.__file__ or module_name} has no {name}; name a function in it"
        )
    factory: Factory = getattr(module, name)
    if not callable(factory):
        raise ValueError(
            f"model.factory {spec.factory}: {name} is of type {type(factory).__name__}; name a function "
            "(fields, numeric, spec) -> torch.nn.Module"
        )
    return factory


def checked(model: object, fields: Fields, spec: ModelSpec) -> nn.Module:
    """What a factory returned, if it is a model over the fields.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model.factory {spec.factory}: returned an object of type {type(model).__name__}; return a torch.nn.Module"
        )
    if all(module is not fields.embeddings for module in model.modules()):
        raise ValueError(
            f"model.factory {spec.factory}: returned a module without the tables; keep the fields as an attribute of "
            "it: self.fields = fields"
        )
    return model
