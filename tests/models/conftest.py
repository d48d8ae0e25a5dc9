"""What the parity tests share: random parameters, and parameters under PyTorch's names."""

import pytest

from tests.torch_networks import check_gradients, draw_params, torch_names


@pytest.fixture(scope="session")
def random_params():
    return draw_params


@pytest.fixture(scope="session")
def to_torch():
    return torch_names


@pytest.fixture(scope="session")
def assert_gradients_equal():
    return check_gradients
