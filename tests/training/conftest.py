import os

import pytest
import torch

# bit-for-bit promises are made for a CPU
os.environ["ACCELERATE_USE_CPU"] = "1"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
