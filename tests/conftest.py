"""The same examples at every run, and no deadline: a shared machine may be slow at any moment."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run here too; to be set before Triton is imported

from hypothesis import settings

settings.register_profile("dansm", deadline=None, derandomize=True, max_examples=60, print_blob=False, database=None)
settings.load_profile("dansm")
torch.set_num_threads(1)  # on a busy machine two threads wait for each other: eight times slower


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
