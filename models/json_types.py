"""Types of JSON, YAML and keyword arguments: values by name. The code that reads them checks their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]
"""A mapping that is only read."""
JsonDict: TypeAlias = dict[str, Any]
"""A mapping that is created or changed."""
