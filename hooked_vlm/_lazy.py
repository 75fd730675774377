"""Public names that are imported on first use, so that importing a package is free."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Module-level `__getattr__` and `__dir__` (PEP 562) of a package, from its `if TYPE_CHECKING:` imports.

    Type checkers and editors read these imports; at run time each is made when its name is first used. Imports from
    the package itself name its modules.
    """
    module = sys.modules[package]
    homes = {
        alias.name: statement.module
        for guard in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for statement in guard.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        home = homes[name]
        value = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
        setattr(module, name, value)
        return value

    return resolve, lambda: sorted({*vars(module), *homes})
