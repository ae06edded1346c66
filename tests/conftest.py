"""The policy of every test.

Exact identities are compared in float64 at round-off.  Random estimates are compared with their
mean, allowing five standard errors of the variance stated in the docstring, so a tolerance is
derived and never tuned.
"""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from fake_corpus import SPEC, write_fakes
from small_models import perturbed, small_paper_gpt2

from opus_bench.archives import ARCHIVES
from opus_bench.corpus import build_corpus


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return perturbed(small_paper_gpt2())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache whose archives are fakes, pinned for the length of the module."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "archives").mkdir()
    write_fakes(cache / "archives")
    with pytest.MonkeyPatch.context() as patch:
        for key, archive in list(ARCHIVES.items()):
            digest = hashlib.sha256((cache / "archives" / archive.filename).read_bytes()).hexdigest()
            patch.setitem(ARCHIVES, key, dataclasses.replace(archive, sha256=digest))
        yield cache


@pytest.fixture(scope="module")
def corpus(cache):
    """A small corpus of invented words."""
    return build_corpus(SPEC, cache, progress=False)
