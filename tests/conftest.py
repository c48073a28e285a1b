"""One thread a worker, Hypothesis profiles, and the laws of one model on one worker."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from lora_fx import LoraFxError
from tests.registry import one_registry

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
            case, kind = shared
            item.add_marker(pytest.mark.xdist_group(f"{case.name}-{kind}"))


def pytest_collection_finish():
    """Graphs are many small objects: looking at the young ones a tenth as often takes a tenth less of all time.

    What was imported and collected is never looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


@pytest.fixture(autouse=True)
def _one_registry(request):
    """torch parses its 500 ONNX functions anew for each export, in about a second: here once for all tests."""
    if request.node.get_closest_marker("onnx"):
        one_registry()


@pytest.fixture(autouse=True)
def _errors_say_where_why_and_what_to_do(monkeypatch):
    """Whichever error a test meets, caught or not, has all its parts."""
    bare = []

    def checked(self, reason, *, place, remedy):
        init(self, reason, place=place, remedy=remedy)
        if not all(isinstance(part, str) and part.strip() for part in (reason, place, remedy)):
            bare.append(str(self))

    init = LoraFxError.__init__
    monkeypatch.setattr(LoraFxError, "__init__", checked)
    yield
    assert not bare


@pytest.fixture
def small_blocks(monkeypatch):
    """Of checkpoints on disk, several rows of a tensor at a time, several blocks of every tensor."""
    from lora_fx.export.checkpoints import arithmetic, fold, streams

    for module in (arithmetic, streams, fold):
        monkeypatch.setattr(module, "BLOCK", 600)
