"""A file that says what the entries of another engine's checkpoints are called (docs/engines.md has an example)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.training_checkpoint.names import Axis, Naming, pattern_of

FORMAT = "secateur-names"
VERSION = 1


def read_naming(path: Path) -> Naming:
    """A naming from a JSON file: the fields of `Naming`, axes as objects with the fields of `Axis`.

    Raises:
        SecateurError: it cannot be read, or an entry is missing, unknown or of another type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
            raise SecateurError(f"expected format {FORMAT!r} and version {VERSION}")
        fields: dict[str, Any] = {"name": path.name}
        for key, value in data.items():
            if key in ("routers", "experts"):
                fields[key] = {str(name): _axis(name, axis) for name, axis in value.items()}
            else:
                fields[key] = _strings(key, value)
        naming = Naming(**fields)
        for template in (*naming.blocks, *naming.optimizer, *naming.settings):
            pattern_of(template)
        _check_templates(naming)
    except OSError as error:
        raise SecateurError(f"names file {path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise SecateurError(f"names file {path}: {error}") from error
    return naming


def _check_templates(naming: Naming) -> None:
    wanted = [(block, {"layer"}) for block in naming.blocks]
    wanted += [(template, {"name", "key"}) for template in (*naming.optimizer, *naming.settings)]
    for template, needs in wanted:
        found = set(re.findall(r"\{(\w+)\}", template)) - {"prefix"}
        if found != needs:
            raise SecateurError(f"{template!r} has the placeholders {sorted(found)}, expected {sorted(needs)}")


def _axis(name: str, value: Any) -> Axis:
    axis = Axis(**value)
    numbers = ((axis.dim, 0), (axis.num_trailing, 0), (1 if axis.rows is None else axis.rows, 1))
    if any(type(number) is not int or number < least for number, least in numbers):
        raise SecateurError(f"{name}: found {value}, expected dim and num_trailing from 0, rows from 1 or null")
    return axis


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise SecateurError(f"{key}: found {value!r:.60}, expected a list of texts")
    return tuple(value)
