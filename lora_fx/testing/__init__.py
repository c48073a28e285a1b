"""Hypothesis strategies and assertions for the tests of those who adapt, fold and export models.

    from lora_fx.testing import adapters, assert_folds_exactly, models, rules_for

    @given(st.data())
    def test_our_pipeline(data):
        model, inputs = data.draw(models())
        lora_fx.apply(model, data.draw(rules_for(model, inputs)), inputs)
        data.draw(adapters())(model)
        assert_folds_exactly(model, inputs)

The assertions take any adapted model; the strategies make models that are unlike yours. No tolerance is set by hand:
bounds are those of `lora_fx.verify`. Needs ``pip install "lora-fx[testing]"``.
"""

from importlib import import_module

from lora_fx.errors import LoraFxError

try:
    import_module("hypothesis")
except ImportError as error:
    raise LoraFxError(
        f"the package hypothesis cannot be imported: {error}",
        place="lora_fx.testing",
        remedy='pip install "lora-fx[testing]"',
    ) from error

from lora_fx.testing.assertions import assert_equivalent, assert_folds_exactly, assert_onnx_equivalent
from lora_fx.testing.comparing import Difference, first_difference
from lora_fx.testing.histories import Histories, histories
from lora_fx.testing.kind_laws import assert_kind
from lora_fx.testing.random_models import BLOCKS, DTYPES, RandomModel
from lora_fx.testing.strategies import Filling, adapters, models, rules_for
from lora_fx.testing.twins import Shared

__all__ = [
    "BLOCKS",
    "DTYPES",
    "Difference",
    "Filling",
    "Histories",
    "RandomModel",
    "Shared",
    "adapters",
    "assert_equivalent",
    "assert_folds_exactly",
    "assert_kind",
    "assert_onnx_equivalent",
    "first_difference",
    "histories",
    "models",
    "rules_for",
]
