"""mkdocs hook: the API reference reads the package as it is installed, with all its rooms under `lora_fx`.

In a checkout `passes` and `export` lie beside `lora_fx`, and pyproject.toml says where each goes. The reference is read
from the sources, never imported, so it is given a folder in which they lie where they will be.
"""

import shutil
import tempfile
import tomllib
from pathlib import Path

from mkdocs.plugins import event_priority

_stage = Path(tempfile.gettempdir())


@event_priority(100)  # before mkdocstrings reads its own settings
def on_config(config):
    global _stage
    root = Path(config.config_file_path).parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    _stage = Path(tempfile.mkdtemp(prefix="lora_fx_docs"))
    for package, folder in sorted(settings["package-dir"].items()):
        shutil.copytree(root / folder, _stage.joinpath(*package.split(".")), dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(_stage)]
    return config


def on_shutdown():
    if _stage.name.startswith("lora_fx_docs"):
        shutil.rmtree(_stage, ignore_errors=True)
