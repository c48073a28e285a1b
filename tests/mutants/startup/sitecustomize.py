"""Python imports this when it starts with this folder on PYTHONPATH: see `tests.mutants.hook`."""

from tests.mutants import hook

hook.install()
