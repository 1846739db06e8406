import pytest
import torch

# The models are too small to share out.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def default_dtype():
    """Sets torch's default dtype until the test has ended."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)
