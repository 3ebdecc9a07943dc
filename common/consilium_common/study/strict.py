"""What every part of a study is made of: frozen, strict models and the names in them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
#: Arguments of registered networks and the like: literals only, validated by their registry.
Literals = dict[str, Any]


class Model(BaseModel):
    """Frozen, and a misspelt key is an error rather than a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
