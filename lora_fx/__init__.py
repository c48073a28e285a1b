"""LoRA as a graph-rewriting compiler pass:   y = x·Wᵀ   ⇄   y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ

The names are those of `lora_fx.application.face`. It is imported, and torch with it, at the first look at one of them,
so that the command line answers before torch is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fx.application.face import *  # noqa: F403
    from lora_fx.application.face import __all__ as __all__

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            globals()[name] = _version()
            return globals()[name]
        if not name.startswith("__") or name == "__all__":
            face = importlib.import_module("lora_fx.application.face")
            globals().update({n: getattr(face, n) for n in face.__all__}, __all__=face.__all__)
        if name in globals():  # also a room, which the import has put here
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from lora_fx.application.face import __all__ as names

    return sorted({*globals(), *names, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lora-fx")
    except PackageNotFoundError:  # a copy that is not installed
        return "unknown"
