"""Python imports this when it starts with this folder on PYTHONPATH: see `tests.mutants.hook`."""

import tests.mutants.hook  # noqa: F401
