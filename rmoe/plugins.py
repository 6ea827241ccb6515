"""Modules and files from outside the package that register routers."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib import import_module
from pathlib import Path

from rmoe.errors import RequestError, one_line
from rmoe.places import expand


def load_plugins(plugins: tuple[str, ...]) -> dict[str, str]:
    """Import the modules or files that register routers.

    Args:
        plugins: `package.module` or a path that ends in `.py`.

    Returns:
        Plugin -> sha256 of its source, so that a run can tell whether it changed.

    Raises:
        RequestError: there is no such module or file, or importing it fails.
    """
    return {plugin: _load_plugin(plugin) for plugin in plugins}


def _load_plugin(plugin: str) -> str:
    try:
        if plugin.endswith(".py"):
            source = expand(plugin, "--plugin")
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
        else:
            source = Path(import_module(plugin).__file__ or "")
        return hashlib.sha256(source.read_bytes()).hexdigest()
    except RequestError:
        raise
    except Exception as error:  # whatever a plugin does wrong is the request's fault, said in one line
        said = one_line(f"{type(error).__name__}: {error}")
        raise RequestError("--plugin", plugin, f"a module or .py file that imports ({said})") from error
