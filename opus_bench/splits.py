"""Splits by document hash, and the removal of duplicates between them.

A document's split follows from its own normalised text and a seed, so it does not move when other
documents come or go. Two documents are near-duplicates when they share most of the shorter one:

    overlap(A, B) = |S(A) & S(B)| / min(|S(A)|, |S(B)|) >= threshold

with S the set of runs of k words. Of such a pair in two splits, the one in the later split of
`PRECEDENCE` is dropped, so no held-out document keeps a near copy in the train pool.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

PRECEDENCE = ("evaluation", "validation", "proxy", "train")
"""Splits, the one that keeps its documents first."""


def normalise(text: str) -> str:
    """Lower case, words only, single spaces: what counts as the same document."""
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def split_of(text: str, fractions: dict[str, float], seed: int) -> str:
    """The split of a document: a uniform number from its hash, against cumulated `fractions`.

    Splits are tried in the order of `PRECEDENCE`; train takes what is left.
    """
    digest = hashlib.sha256(f"{seed}\n{normalise(text)}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    for split in PRECEDENCE[:-1]:
        uniform -= fractions.get(split, 0.0)
        if uniform < 0:
            return split
    return "train"


class Shingles:
    """Sets of runs of k words, as sorted arrays of 64-bit hashes; a shorter text is one run.

    Exactness: exact but for collisions of two runs in 64 bits (about 1e-6 for ten million runs).
    """

    def __init__(self, size: int):
        self.size = size
        self.words: dict[str, int] = {}
        self.multipliers = np.random.default_rng(0).integers(2**63, size=size, dtype=np.uint64) * 2 + 1

    def __call__(self, text: str) -> np.ndarray:
        words = self.words
        ids = [words.setdefault(word, len(words) + 1) for word in normalise(text).split()]
        ids += [0] * (self.size - len(ids))
        windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype=np.uint64), self.size)
        return np.unique(windows @ self.multipliers)


def near_duplicates(documents: Sequence[np.ndarray], references: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """Whether each document overlaps with any reference by at least `threshold`.

    Args:
        documents, references: shingle sets, sorted and without repeats.
        threshold: smallest overlap, in (0, 1], that counts as a duplicate.

    Cost: a product of two sparse incidence matrices; proportional to the pairs that share a run.
    """
    duplicate = np.zeros(len(documents), dtype=bool)
    if not len(documents) or not len(references):
        return duplicate
    columns = np.unique(np.concatenate(references))
    target, target_size = incidence(references, columns)
    target = target.T.tocsr()
    for start in range(0, len(documents), 2048):
        block, size = incidence(documents[start : start + 2048], columns)
        shared = (block @ target).tocoo()
        close = shared.data >= threshold * np.minimum(size[shared.row], target_size[shared.col])
        duplicate[start + shared.row[close]] = True
    return duplicate


def incidence(sets: Sequence[np.ndarray], columns: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
    """0/1 matrix (set, column) over the elements found in `columns`, and the full set sizes."""
    sizes = np.array([len(one) for one in sets])
    rows = np.repeat(np.arange(len(sets)), sizes)
    values = np.concatenate(sets)
    place = np.minimum(np.searchsorted(columns, values), len(columns) - 1)
    found = columns[place] == values
    ones = np.ones(int(found.sum()), dtype=np.int32)
    return sparse.csr_matrix((ones, (rows[found], place[found])), (len(sets), len(columns))), sizes
