"""Values by name: what JSON, YAML and keyword arguments of timm hold. Whoever reads one checks what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]
"""One that is read."""
JsonDict: TypeAlias = dict[str, Any]
"""One that is made, or changed."""
