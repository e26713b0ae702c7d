"""What the other benchmarks share: loading the script that a command names."""

import importlib
import sys
from pathlib import Path
from types import ModuleType


def load(path: str, ending: str = ".py") -> ModuleType:
    """The script as a module. A copy in another folder comes before the repository's script of the same name."""
    file = Path(path).resolve()
    if not file.is_file() or not file.name.startswith("ppo_") or not file.name.endswith(ending):
        raise SystemExit(f"{path}: not a script ppo_*{ending}")
    sys.path.insert(0, str(file.parent))
    return importlib.import_module(file.stem)
