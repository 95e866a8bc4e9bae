"""Kernels here run in Triton's interpreter, so the environment says so before anything imports them."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from tests.kernels import interpreter  # noqa: F401  replaces the interpreter's methods before a kernel is seen


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """numpy and torch are several times faster on these small tiles with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
