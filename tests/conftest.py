"""The policy of every test.

Exact identities are compared in float64 at round-off.  Random estimates are compared with their
mean, allowing five standard errors of the variance stated in the docstring, so a tolerance is
derived and never tuned.
"""

from __future__ import annotations

import pytest
import torch
from small_models import perturbed, small_paper_gpt2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return perturbed(small_paper_gpt2())
