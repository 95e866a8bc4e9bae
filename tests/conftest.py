"""Before anything imports Triton: its kernels run in the interpreter in these tests (tests/kernels), with or
without a GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
