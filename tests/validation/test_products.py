"""Float32 matrices are multiplied by what is faster only where that is as precise."""

import pytest
import torch

from sa_convert.models import products
from sa_convert.models.products import error_of, fast_products, plain_products, precise_products


@pytest.fixture
def unknown():
    """What this machine does is measured anew, and forgotten."""
    products._as_precise.cache_clear()
    yield
    products._as_precise.cache_clear()


def test_products_are_float32_s_and_the_setting_of_before_comes_back():
    generator = torch.Generator().manual_seed(1)
    states, weight = torch.randn(300, 200, generator=generator), torch.randn(70, 200, generator=generator)
    before = torch.get_float32_matmul_precision()
    with precise_products("cpu"):
        found = torch.nn.functional.linear(states, weight)
    assert error_of(found, states.double() @ weight.double().T) < 1e-5
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), fast_products():
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_a_machine_that_rounds_is_left_alone(unknown, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda one, other: (one.bfloat16() @ other.bfloat16().T).float())
    before = torch.get_float32_matmul_precision()
    with precise_products("cpu"):
        assert torch.get_float32_matmul_precision() == before


def test_accelerators_are_left_alone():
    before = torch.get_float32_matmul_precision()
    with precise_products("cuda"):
        assert torch.get_float32_matmul_precision() == before


def test_within_it_a_part_may_run_as_torch_does_for_everyone():
    with fast_products():
        with plain_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
