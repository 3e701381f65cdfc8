"""Hydra's instantiate, without its wrapping of the user's own mistakes."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from models.errors import UserError


def build(node: Any, **arguments: Any) -> Any:
    """Instantiate a node. A UserError raised by a constructor comes out as itself, not as Hydra's error about it."""
    try:
        return instantiate(node, _convert_="all", **arguments)  # lists and dicts, not OmegaConf's
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise
