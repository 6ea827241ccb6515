"""Modules and files from outside the package that register routers."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rmoe.errors import RequestError, one_line
from rmoe.places import expand
from rmoe.records import sha256
from rmoe.validation import require


def load_plugins(plugins: tuple[str, ...]) -> dict[str, str]:
    """Import the modules or files that register routers.

    Args:
        plugins: `package.module` or a path that ends in `.py`.

    Returns:
        Plugin -> sha256 of its source when it was imported, so that a run can tell whether it changed.

    Raises:
        RequestError: there is no such module or file, importing it fails, or it was imported before and has changed.
    """
    return {plugin: _load_plugin(plugin) for plugin in plugins}


def loaded() -> list[str]:
    """sha256 of the source of every plugin that this process has imported."""
    hashes = (getattr(module, "__rmoe_sha256__", None) for module in list(sys.modules.values()))
    return sorted({found for found in hashes if isinstance(found, str)})


def _load_plugin(plugin: str) -> str:
    try:
        module = _from_file(expand(plugin, "--plugin")) if plugin.endswith(".py") else import_module(plugin)
        now = _sha256_of(Path(module.__file__ or ""))
        imported: str = vars(module).setdefault("__rmoe_sha256__", now)
    except RequestError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever a plugin does wrong is the request's fault, said in one line
        said = one_line(f"{type(error).__name__}: {error}")
        raise RequestError("--plugin", plugin, f"a module or .py file that imports ({said})") from error
    require(now == imported, "--plugin", plugin, "as it was imported; it has changed since: restart Python")
    return imported


def _from_file(source: Path) -> ModuleType:
    name = f"rmoe_plugin_{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _sha256_of(source: Path) -> str:
    """Of a module's file; of a package, of every `.py` below it."""
    files = sorted(source.parent.rglob("*.py")) if source.name == "__init__.py" else [source]
    if len(files) == 1:
        return sha256(files[0])
    listed = [f"{sha256(file)} {file.relative_to(source.parent).as_posix()}" for file in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()
