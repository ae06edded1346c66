"""Tokens, FLOPs and bytes of a selection step by formula; nothing is run.

Held against torch's counter on real models by tests/test_overhead.py, to the last FLOP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opus_bench.model import SIZES
from opus_bench.distributed.state import newton_schulz_flops
from opus_bench.preconditioner import inner_flops, left_flops

ESTIMATORS = {  # as the records name them: what is done
    "CountSketch": "dense gradients formed, then hashed: the literal method",
    "exact alignment": "contraction with the preconditioned proxy gradient, no gradient formed",
    "exact alignment and Gram": "dense gradients formed in chunks, inner products of all pairs",
    "central difference": "losses at weights moved both ways along the preconditioned proxy gradient, no backward",
}


@dataclass(frozen=True)
class Shape:
    """A model and a selection step.  Widths in numbers, lengths in tokens, batches in sequences."""

    name: str
    source: str  # paper, released launch script, benchmark
    layers: int
    width: int
    vocabulary: int
    length: int  # L, tokens of a training sequence
    candidates: int  # N
    proxies: int  # M, sequences of a proxy batch
    selected: int  # K
    window: int  # W, tokens scored of candidates and proxies
    feed_forward: int | None = None  # None: four times the width
    kv_width: int | None = None  # None: the width; less with grouped queries
    gated: bool = False  # an MLP of three matrices instead of two
    query_width: int | None = None  # of all heads together; None: the width
    tied: bool = True  # the head is the embedding

    @property
    def queries(self) -> int:
        """Width of the queries, and of what the heads give."""
        return self.width if self.query_width is None else self.query_width

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.width if self.kv_width is None else self.kv_width

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return 4 * self.width if self.feed_forward is None else self.feed_forward

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every matrix of one block: what is scored."""
        d, inner = self.width, self.inner
        attention = [(self.queries, d), (self.keys, d), (self.keys, d), (d, self.queries)]
        return *attention, *[(inner, d)] * (1 + self.gated), (d, inner)

    @property
    def block_parameters(self) -> int:
        """Numbers in the matrices of all blocks."""
        return self.layers * sum(o * i for o, i in self.matrices)

    @property
    def head_parameters(self) -> int:
        """Numbers in the matrix that makes logits; the embedding is a lookup and has no FLOPs."""
        return self.width * self.vocabulary


LARGE = Shape("GPT-2 Large", "paper", *SIZES["gpt2-large"][:2], 50304, 24576, 64, 8, 32, 512)
XL = Shape("GPT-2 XL", "paper", *SIZES["gpt2-xl"][:2], 50304, 6144, 32, 8, 16, 512)
SHAPES = (
    LARGE,
    XL,
    replace(XL, name="GPT-2 XL, N 64", candidates=64, selected=32),
    replace(XL, name="GPT-2 XL, M 16", source="paper, but for M", proxies=16),
    Shape("Qwen3-8B", "paper", 36, 4096, 151936, 4096, 16, 8, 8, 512, feed_forward=12288, kv_width=1024, gated=True,
          tied=False),
    Shape("A", "benchmark", 6, 384, 4096, 512, 16, 8, 4, 128),
)


def token_ratio(shape: Shape) -> float:
    """Tokens scored over tokens trained on, (N + M) W / (K L)."""
    return (shape.candidates + shape.proxies) * shape.window / (shape.selected * shape.length)


def attention_flops(shape: Shape, n: int, t: int, causal: bool = False) -> int:
    """Products of queries with keys and of weights with values, forward: 4 n t^2 d a layer, the full square.

    d is here the width of the queries.

    The full square is what torch's counter counts; ``causal``: the half that a causal kernel needs.
    """
    return (2 if causal else 4) * n * t * t * shape.queries * shape.layers


def matrix_flops(shape: Shape, n: int, t: int) -> int:
    """One product of n t positions with every matrix, 2 n t (P_blocks + P_head)."""
    return 2 * n * t * (shape.block_parameters + shape.head_parameters)


def forward_flops(shape: Shape, n: int, t: int, causal: bool = False) -> int:
    """Forward of n sequences of t tokens: 2 n t (P_blocks + P_head) + 4 n t^2 d layers.

    Exactness: equals torch's counter for `OpusGPT2` and transformers' Qwen3 with attention by plain matrix products.
        Counts products of matrices alone: no norm, activation, softmax, rotation, loss or lookup.
    """
    return matrix_flops(shape, n, t) + attention_flops(shape, n, t, causal)


def activation_flops(shape: Shape, n: int, t: int, causal: bool = False) -> int:
    """Backward to activations, down to the embedding: 2 n t (P_blocks + P_head) + 8 n t^2 d layers.

    Exactness: equals torch's counter where the embedding's output needs a gradient.  Where only outputs of linear
        layers do, the first block's q, k and v need no gradient of their input: 2 n t d (d_q + 2 d_kv) fewer.
        Fused attention computes its products with keys again, 2 n t^2 d a layer, which is not counted.
    """
    return matrix_flops(shape, n, t) + 2 * attention_flops(shape, n, t, causal)


def dense_flops(shape: Shape, n: int, t: int) -> int:
    """sum_t b_t a_t^T of every block matrix, one a sample or summed over samples alike: 2 n t P_blocks."""
    return 2 * n * t * shape.block_parameters


def training_flops(shape: Shape, causal: bool = False) -> int:
    """A step on K sequences of L tokens: forward, backward to activations, and 2 K L (P_blocks + P_head).

    Exactness: equals torch's counter.  The optimizer's own work is not counted.
    """
    n, t = shape.selected, shape.length
    return (forward_flops(shape, n, t, causal) + activation_flops(shape, n, t, causal) + matrix_flops(shape, n, t))


def proxy_flops(shape: Shape, causal: bool = False) -> int:
    """The gradient of the blocks for one proxy batch: forward, backward to activations, 2 M W P_blocks."""
    n, t = shape.proxies, shape.window
    return forward_flops(shape, n, t, causal) + activation_flops(shape, n, t, causal) + dense_flops(shape, n, t)


def candidate_flops(shape: Shape, estimator: str, causal: bool = False) -> int:
    """What an estimator does to score N windows of W tokens, given the proxy's gradient.

        CountSketch                forward, backward to activations, 2 N W P_blocks for the dense gradients
        exact alignment            forward, backward to activations, 2 N W P_blocks for the contraction
        exact alignment and Gram   as CountSketch, and 2 N^2 P_blocks
        central difference         two forwards

    Not counted: hashing, which moves N P_blocks numbers but multiplies no matrices; the sketches' own Gram;
    what P_t does, elementwise for AdamW and `muon_flops` for Muon.

    Raises:
        ValueError: an unknown estimator.
    """
    n, t = shape.candidates, shape.window
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    if estimator == "central difference":
        return 2 * forward_flops(shape, n, t, causal)
    gram = 2 * n * n * shape.block_parameters if estimator == "exact alignment and Gram" else 0
    return (forward_flops(shape, n, t, causal) + activation_flops(shape, n, t, causal) + dense_flops(shape, n, t)
            + gram)


def muon_flops(shape: Shape, columns: int | None = None) -> int:
    """P_t of Muon for every block matrix once, and S applied to so many columns of each.

    None: to one gradient, i columns, which makes it 6 o i^2 + 2 i^3 for o > i, else 4 o^2 i + 2 o^3.  Several
    processes divide what is done once between them (`opus_bench.distributed.state`); this is the sum of all.

    Exactness: equals torch's counter.
    """
    return shape.layers * sum(inner_flops(o, i) + left_flops(o, i, i if columns is None else columns)
                              for o, i in shape.matrices)


def flop_ratio(shape: Shape, estimator: str, proxy_every: int = 1, causal: bool = False) -> float:
    """FLOPs of scoring over those of the training step that it chooses the batch of.

    Args:
        proxy_every: steps for which a proxy gradient is kept; its cost is spread over them.
        causal: attention counted by the half that a causal kernel needs, in both.

    Raises:
        ValueError: an unknown estimator, a ``proxy_every`` below 1.
    """
    if proxy_every < 1:
        raise ValueError(f"proxy_every must be at least 1, got {proxy_every}")
    scoring = candidate_flops(shape, estimator, causal) + proxy_flops(shape, causal) / proxy_every
    return scoring / training_flops(shape, causal)


def scoring_flops(shape: Shape, selector: str, options: dict, optimizer: str, causal: bool = False) -> float:
    """What a selector does for one step on N candidates, by its name and options in the records.

        random, quality   none: a static score is made once, `encoder_flops`
        perplexity        one forward of the candidates' windows
        greats            exact alignment and Gram, a proxy every ``proxy_every`` steps
        opus              the estimator of the arm or of the option ``estimator`` (sketch, forward), and a proxy; layers
                          other than the blocks add the head's products; under Muon P_t is made once a step and
                          applied to the proxy's gradient, or, for sketches and the Gram, to b of every position
                          (`muon_flops`); not where the option ``preconditioner`` leaves P_t out

    Not counted: what `candidate_flops` does not count, but for Muon's P_t, and the real map of ``adjoint``.

    Raises:
        ValueError: an unknown selector.
    """
    n, t = shape.candidates, min(shape.window, shape.length)
    shape = replace(shape, window=t)
    if selector in ("random", "quality"):
        return 0
    if selector == "perplexity":
        return forward_flops(shape, n, t, causal)
    if selector not in ("greats", "opus"):
        raise ValueError(f"no count for selector {selector!r}; known: random, quality, perplexity, greats, opus")
    calibrated = options.get("arm") == "calibrated"
    every = options.get("proxy_every", 8 if calibrated else 1)
    names = {"sketch": "CountSketch", "exact": "exact alignment", "forward": "central difference"}
    estimator = names[options.get("estimator", "exact" if calibrated else "sketch")]
    redundancy = options.get("redundancy", 0 if calibrated else 1)
    if selector == "greats" or (estimator == "exact alignment" and redundancy != 0):
        estimator = "exact alignment and Gram"
    total = candidate_flops(shape, estimator, causal) + proxy_flops(shape, causal) / every
    head = options.get("layers", "matrices" if calibrated else "blocks") != "blocks"
    if head and estimator != "central difference":
        total += 2 * n * t * shape.head_parameters + 2 * shape.proxies * t * shape.head_parameters / every
    if selector == "opus" and optimizer == "muon" and options.get("preconditioner", "frozen") == "frozen":
        total += muon_flops(shape, n * t if estimator in ("CountSketch", "exact alignment and Gram") else None)
    return total


def encoder_flops(parameters: int | None, tokens: int) -> int:
    """A forward over text: 2 parameters tokens; 0 for a bag of hashed words, whose sums are negligible beside it.

    An upper bound for an encoder that reads the beginning of a document alone; attention is not counted.
    """
    return 0 if parameters is None else 2 * parameters * tokens


def kept_bytes(shape: Shape, width: int = 8192) -> dict[str, int]:
    """Bytes that scoring holds beside the model, its optimizer and the activations of one microbatch.

        hash tables of the literal method   12 P_blocks: a 64-bit bucket and a 32-bit sign for each weight
        proxy gradient                      4 P_blocks, for every estimator
        direction V                         4 P_blocks, where alignment is taken along it; scored weights once more
                                            (4 P_blocks) for the central difference, which restores them
        sketches                            4 N width for each of the blocks' matrices
    """
    matrices = shape.layers * len(shape.matrices)
    p = shape.block_parameters
    return {"hash tables of the literal method": 12 * p, "proxy gradient": 4 * p, "direction V": 4 * p,
            "copy of the weights (central difference)": 4 * p,
            "sketches": 4 * shape.candidates * width * matrices}


def muon_step_flops(shape: Shape, iterations: int = 5) -> int:
    """What one step of Muon multiplies: Newton-Schulz of every block matrix.

    Exactness: equals torch's counter on torch.optim.Muon.  AdamW's step multiplies no matrices: 0.
    """
    return shape.layers * sum(newton_schulz_flops(o, i, iterations) for o, i in shape.matrices)


def recomputed_flops(shape: Shape, n: int, t: int, causal: bool = False, observed: bool = False) -> int:
    """What checkpointing computes again in a backward: the blocks' forward, 2 n t P_blocks + 4 n t^2 d layers.

    The last product of each block, 2 n t d inner, is not made again, as no gradient needs its result, unless layers'
    inputs and outputs are ``observed``, as in scoring with a backward.  Exactness: equals torch's counter.
    """
    last = 0 if observed else 2 * n * t * shape.layers * math.prod(shape.matrices[-1])
    return 2 * n * t * shape.block_parameters + attention_flops(shape, n, t, causal) - last
