"""How a saved folder finds this package again.

The folder gets two small files and an `auto_map` that names them. They only import `rmoe`: where it is installed,
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` works without importing anything first, and
where it is not, transformers reads their imports and says `pip install rmoe`. After `import rmoe.model` the classes
are registered and no remote code is involved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

AUTO_MAP = {
    "AutoConfig": "configuration_rmoe.RMoEConfig",
    "AutoModel": "modeling_rmoe.RMoEModel",
    "AutoModelForCausalLM": "modeling_rmoe.RMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_rmoe.RMoEForSequenceClassification",
}

_FILES = {
    "configuration_rmoe.py": "from rmoe.model import RMoEConfig\n",
    "modeling_rmoe.py": "from rmoe.model import RMoEForCausalLM, RMoEForSequenceClassification, RMoEModel\n",
}


def write_auto_code(
    folder: Path,
    files: Mapping[str, str] = MappingProxyType(_FILES),
    auto_map: Mapping[str, str] = MappingProxyType(AUTO_MAP),
) -> None:
    """Write the files (name -> text) beside a saved model and name their classes in its `config.json`."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = dict(auto_map)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
