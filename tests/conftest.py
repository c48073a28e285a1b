"""One thread a worker, Hypothesis profiles, and the laws of one model on one worker."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

#: not `explain`: it traces every line of a failing example, torch's too, which takes minutes
common = dict(
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("ci", derandomize=True, max_examples=60, **common)
settings.register_profile("deep", max_examples=2000, print_blob=True, **common)
settings.load_profile(os.environ.get("LORA_FX_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share a built model run on one worker, one after the other."""
    for item in items:
        shared = getattr(item, "callspec", None) and item.callspec.params.get("adapted")
        if shared is not None:
            item.add_marker(pytest.mark.xdist_group(shared.name))
