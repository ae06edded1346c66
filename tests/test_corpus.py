"""A corpus is a pure function of its spec, its splits share nothing, and damage never goes unseen.

The archives here are small fakes with the layout of the real ones, so no test needs a network.
Random shares are compared with their mean, allowing five standard errors.
"""

import dataclasses
import math
import re
import shutil
import threading
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from opus_bench import corpus as corpus_module
from opus_bench import stream as stream_module
from opus_bench.archives import ARCHIVES, CorpusError
from opus_bench.corpus import Corpus, CorpusSpec, build_corpus
from opus_bench.corpus_build import split_documents
from opus_bench.sources import QUALITY, Document, catalogue_entries, clean, corrupt, read_documents
from opus_bench.splits import Shingles, near_duplicates, split_of
from opus_bench.stream import CandidateStream, PoolProxyStream, ProxyStream
from fake_corpus import SPEC, prose

FIVE_SIGMA = 5.0


@pytest.fixture
def copy(corpus, tmp_path):
    """A corpus folder that a test may spoil."""
    return shutil.copytree(corpus.directory, tmp_path / "copy")


def brute_shingles(text, size):
    words = re.findall(r"\w+", text.lower()) or [text.strip()]
    words += [None] * (size - len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def brute_overlap(a, b, size):
    a, b = brute_shingles(a, size), brute_shingles(b, size)
    return len(a & b) / min(len(a), len(b))


# Sources and labels


def test_members_get_the_domain_and_quality_of_their_kind(cache):
    want = {
        "wiki": {"encyclopedia": 400, "foreign": 200},
        "recipes": {"recipes": 200},
        "dictionary": {"dictionary": 9},
        "django": {"technical": 1, "code": 1, "catalogues": 1, "minified": 2},
        "sympy": {"mathematics": 2, "code": 1},
    }
    for key, counts in want.items():
        documents = read_documents(key, list(QUALITY), cache)
        assert Counter(document.domain for document in documents) == counts
        for document in documents:
            assert document.quality == QUALITY[document.domain] and document.source.startswith(ARCHIVES[key].pin + ":")
    assert "()" not in read_documents("recipes", ["recipes"], cache)[0].text
    assert "Anon" not in read_documents("django", ["catalogues"], cache)[0].text
    assert read_documents("wiki", ["foreign"], cache)[0].domain == "foreign"


def test_untranslated_entries_and_headers_are_left_out():
    text = 'msgid ""\nmsgstr ""\n"X: y"\n\nmsgid "a"\nmsgstr "b"\n\nmsgid "c"\nmsgstr ""\n\n# note\n'
    assert catalogue_entries(text) == 'msgid "a"\nmsgstr "b"'


def test_cleaning_removes_the_marker_and_cuts_long_texts_at_a_line():
    assert clean(" a<|endoftext|>\r\nb \ud800") == "a\nb ?"
    long = "\n".join(["x" * 99] * 300)
    assert len(clean(long)) == 19_999 and clean(long).endswith("x" * 99)


def test_corruption_does_what_its_label_says():
    rng = np.random.default_rng(1)
    documents = [Document(prose(rng, 40), "encyclopedia", 1, f"p==1:{n}") for n in range(90)]
    by_source = {document.source: document for document in documents}
    vocabulary = {word for document in documents for word in document.text.split()}
    made = corrupt(documents, 10**9, seed=0)
    assert made == corrupt(documents, 10**9, seed=0) != corrupt(documents, 10**9, seed=1)
    defects = Counter()
    for document in made:
        assert (document.domain, document.quality) == ("corrupted", 4)
        defect, _, source = document.source.partition(":")
        original, words = by_source[source].text.split(), document.text.split()
        defects[defect] += 1
        assert len(words) == len(original) and words != original and set(words) <= vocabulary
        if defect == "shuffled":
            assert sorted(words) == sorted(original)
        if defect == "repeated":
            assert any(words[i] == words[i + size] for size in range(3, 13) for i in [0]) and len(set(words)) <= 12
            assert " ".join(words[: len(set(words))]) in by_source[source].text
        if defect == "random":
            assert len(set(words) - set(original)) > len(words) / 2
    assert defects == {"shuffled": 30, "random": 30, "repeated": 30}
    assert sum(len(one.text) for one in corrupt(documents, 1000, seed=0)) in range(1000, 1500)


# Splits and duplicates


def test_split_follows_the_text_alone_in_the_stated_fractions(n=20_000):
    fractions = {"proxy": 0.1, "validation": 0.1, "evaluation": 0.18}
    counts = Counter(split_of(f"text {i}", fractions, seed=0) for i in range(n))
    for split, p in {**fractions, "train": 0.62}.items():
        assert abs(counts[split] / n - p) < FIVE_SIGMA * math.sqrt(p * (1 - p) / n)
    assert split_of("A  Text!", fractions, 0) == split_of("a text", fractions, 0)
    assert len({split_of("a text", fractions, seed) for seed in range(50)}) == 4


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0])
def test_near_duplicates_are_those_found_by_comparing_every_pair(threshold):
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(list("abcdef"), size=rng.integers(1, 14))) for _ in range(120)]
    shingles = Shingles(3)
    sets = [shingles(text) for text in texts]
    got = near_duplicates(sets[:80], sets[80:], threshold)
    want = [any(brute_overlap(a, b, 3) >= threshold for b in texts[80:]) for a in texts[:80]]
    assert got.tolist() == want and 0 < sum(want) < 80
    assert not near_duplicates(sets, [], threshold).any() and len(near_duplicates([], sets, threshold)) == 0


def planted(n=240):
    """Documents of which a third are near copies of others, by a changed word or by containment."""
    rng = np.random.default_rng(3)
    documents = []
    for i in range(n):
        text = prose(rng, 60)
        documents.append(Document(text, ["encyclopedia", "recipes", "foreign"][i % 3], 1, f"p==1:{i}"))
        if i % 3 == 0:
            words = text.split()
            words[int(rng.integers(60))] = "changed"
            documents.append(Document(" ".join(words), "encyclopedia", 1, f"p==1:{i}-changed"))
            documents.append(Document(text + " " + prose(rng, 60), "recipes", 1, f"p==1:{i}-longer"))
        if i % 10 == 0:
            documents.append(Document(text.upper(), "encyclopedia", 1, f"p==1:{i}-same"))
    return documents


def test_no_pair_in_two_splits_overlaps_above_the_threshold():
    documents = planted()
    splits, dropped = split_documents(SPEC, documents)
    assert dropped["exact"] and sum(dropped["near"]["train"].values()) > 10
    kept = [(split, document.text) for (split, _), texts in splits.items() for document in texts]
    sets = [brute_shingles(text, SPEC.shingle) for _, text in kept]
    across = [
        len(sets[i] & sets[j]) / min(len(sets[i]), len(sets[j]))
        for i, j in combinations(range(len(kept)), 2)
        if kept[i][0] != kept[j][0]
    ]
    assert max(across) < SPEC.overlap
    within = [d.source for texts in splits.values() for d in texts if d.domain != "corrupted"]
    assert len(within) == len(set(within))


def test_the_split_that_comes_first_keeps_its_documents():
    documents = [document for document in planted() if not document.source.endswith("-same")]
    splits, dropped = split_documents(dataclasses.replace(SPEC, limit_characters=10**6), documents)
    assert sum(dropped["near"]["evaluation"].values()) == 0
    kept = {document.source for texts in splits.values() for document in texts}
    held = {document.source for (split, _), texts in splits.items() for document in texts if split != "train"}
    shingles = Shingles(SPEC.shingle)
    lost = [shingles(document.text) for document in documents if document.source not in kept]
    first = [shingles(document.text) for document in documents if document.source in held]
    assert len(lost) > 10 and near_duplicates(lost, first, SPEC.overlap).all()


def test_splits_do_not_depend_on_the_order_of_documents():
    documents = [document for document in planted() if not document.source.endswith("-same")]
    forward, backward = split_documents(SPEC, documents)[0], split_documents(SPEC, documents[::-1])[0]
    assert forward == backward


def test_limits_cut_a_domain_without_moving_what_is_left():
    documents = planted()
    full = split_documents(SPEC, documents)[0]
    cut = split_documents(dataclasses.replace(SPEC, limit_characters=9_000), documents)[0]
    for domain in ("recipes", "foreign"):
        few = sum(len(d.text) for split in ("train", "validation", "evaluation") for d in cut[split, domain])
        assert few < 9_000 + 1_000 < sum(len(d.text) for d in full["train", domain])
        for split in ("validation", "evaluation"):
            assert set(cut[split, domain]) <= set(full[split, domain])


# Building and opening


def test_two_builds_are_identical(corpus, cache, tmp_path):
    shutil.copytree(cache / "archives", tmp_path / "archives")
    other = build_corpus(SPEC, tmp_path, progress=False)
    assert other.manifest == corpus.manifest
    assert other.train_sha256 == corpus.train_sha256 and other.proxy_sha256 == corpus.proxy_sha256
    assert corpus.directory.name == SPEC.sha256[:12] and corpus.spec == SPEC


def test_the_spec_hash_covers_every_field_and_every_pin(monkeypatch):
    hashes = {SPEC.sha256}
    changes = {
        "sources": ("wiki", "recipes", "sympy"),
        "target": "recipes",
        "vocab_size": 321,
        "shares": {"encyclopedia": 0.4, "recipes": 0.3, "foreign": 0.1, "corrupted": 0.2},
        "limit_characters": 1,
        "target_characters": 1,
        "shingle": 6,
        "overlap": 0.5,
        "split_seed": 1,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(CorpusSpec)}
    for field, value in changes.items():
        hashes.add(dataclasses.replace(SPEC, **{field: value}).sha256)
    monkeypatch.setitem(ARCHIVES, "wiki", dataclasses.replace(ARCHIVES["wiki"], sha256="0" * 64))
    hashes.add(SPEC.sha256)
    assert len(hashes) == len(changes) + 2


def test_a_second_call_opens_what_the_first_built(corpus, cache, monkeypatch):
    monkeypatch.setattr(corpus_module, "write_corpus", None)
    assert build_corpus(SPEC, cache).manifest == corpus.manifest


def test_an_interrupted_build_leaves_no_corpus(cache, monkeypatch):
    spec = dataclasses.replace(SPEC, split_seed=7)
    corpora = cache / "corpora"
    (corpora / f".{spec.sha256[:12]}.building.killed").mkdir(parents=True)

    def interrupted(spec, directory, cache, progress):
        (directory / "tokenizer.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_module, "write_corpus", interrupted)
        build_corpus(spec, cache)
    assert [path for path in corpora.glob(f"*{spec.sha256[:12]}*") if path.is_dir()] == []


def test_concurrent_calls_share_one_build(cache, monkeypatch):
    spec = dataclasses.replace(SPEC, split_seed=8)
    calls, opened, real = [], [], corpus_module.write_corpus
    monkeypatch.setattr(corpus_module, "write_corpus", lambda *a: (calls.append(1), real(*a)))
    threads = [threading.Thread(target=lambda: opened.append(build_corpus(spec, cache, False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(opened) == 3


@pytest.mark.parametrize("name", ["train/recipes.bin", "evaluation/encyclopedia.jsonl", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(copy, name, damage):
    path = copy / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-2])
    else:
        path.unlink()
    with pytest.raises(CorpusError, match=f"{re.escape(name)}.*build again"):
        Corpus(copy)


@pytest.mark.parametrize("damage", ["remove", "cut", "edit"])
def test_a_damaged_manifest_is_named(copy, damage):
    path = copy / "manifest.json"
    text = path.read_text()
    if damage == "remove":
        path.unlink()
    else:
        path.write_text(text[:-50] if damage == "cut" else text.replace('"split_seed": 0', '"split_seed": 1'))
    with pytest.raises(CorpusError, match="build again"):
        Corpus(copy)


def test_shards_hold_the_documents_of_their_split_and_nothing_else(corpus):
    tokenizer = corpus.tokenizer()
    assert len(tokenizer) == corpus.vocab_size <= SPEC.vocab_size
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == tokenizer.unk_token == "<|endoftext|>"
    seen = set()
    for split, domain in SPEC.shards:
        tokens, texts = corpus.tokens(split, domain), corpus.documents(split, domain)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
        assert tokenizer.decode(tokens).split("<|endoftext|>") == [*texts, ""]
        count = corpus.manifest["counts"][split][domain]
        assert (count["documents"], count["tokens"]) == (len(texts), len(tokens))
        assert count["characters"] == sum(map(len, texts))
        assert seen.isdisjoint(texts)
        seen.update(texts)
        assert {record["quality"] for record in corpus.records(split, domain)} == {QUALITY[domain]}


def test_a_marker_inside_a_text_stays_text(corpus):
    from opus_bench.corpus_build import encode

    tokens = encode(corpus.tokenizer().backend_tokenizer, ["a<|endoftext|>b"])
    assert (tokens == 0).sum() == 1 and tokens[-1] == 0


def test_sequences_are_consecutive_and_do_not_overlap(corpus):
    tokens = corpus.tokens("validation", "recipes")
    sequences = corpus.sequences("validation", "recipes", 16)
    assert sequences.dtype == torch.long and sequences.shape == (len(tokens) // 16, 16)
    assert sequences.flatten().tolist() == tokens[: sequences.numel()].tolist()
    assert torch.equal(corpus.sequences("validation", "recipes", 16, 3), sequences[:3])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"shares": {"encyclopedia": 0.5, "recipes": 0.4}}, "sum to 0.9"),
        ({"shares": {"encyclopedia": 0.5, "code": 0.5}}, "'code' has a share but no text"),
        ({"shares": {"encyclopedia": 0.5, "novels": 0.5}}, "unknown domain 'novels'"),
        ({"shares": {"encyclopedia": 1.5, "recipes": -0.5}}, "share of 'encyclopedia' is 1.5"),
        ({"shares": (("recipes", 0.5), ("recipes", 0.5))}, "once"),
        ({"target": "code"}, "target 'code'"),
        ({"target": "corrupted"}, "target 'corrupted'"),
        ({"sources": ("attic",)}, "unknown source 'attic'"),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"overlap": 0.0}, "overlap is 0"),
        ({"shingle": 0}, "at least 1"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(CorpusError, match=message):
        dataclasses.replace(SPEC, **changes)


def test_a_domain_without_text_in_a_split_is_named(cache):
    with pytest.raises(CorpusError, match="no evaluation text of 'recipes'"):
        build_corpus(dataclasses.replace(SPEC, limit_characters=100), cache, progress=False)


def test_questions_the_corpus_cannot_answer_are_refused(corpus):
    with pytest.raises(CorpusError, match="no proxy text of 'recipes'"):
        corpus.tokens("proxy", "recipes")
    with pytest.raises(CorpusError, match="does not fit validation/foreign"):
        corpus.sequences("validation", "foreign", 10**6)


# Streams


def same(a, b):
    return a.domains == b.domains and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "ids", "quality")
    )


def test_candidates_are_a_pure_function_of_the_step(corpus):
    stream = CandidateStream(corpus, 16, 8, seed=3)
    forward = [stream.candidates(step) for step in range(6)]
    fresh = CandidateStream(corpus, 16, 8, seed=3)
    for step in (5, 0, 3, 1500, 2):
        if step < 6:
            assert same(fresh.candidates(step), forward[step])
    assert same(fresh.candidates(1500), stream.candidates(1500))
    other = CandidateStream(corpus, 16, 8, seed=4).candidates(0)
    assert other.domains != forward[0].domains and not torch.equal(other.tokens, forward[0].tokens)
    assert not same(forward[0], forward[1])


def test_no_sequence_returns_before_its_domain_is_exhausted(corpus, monkeypatch):
    monkeypatch.setattr(stream_module, "BLOCK", 5)
    stream = CandidateStream(corpus, 64, 7, seed=0)
    shown = {domain: [] for domain in corpus.domains}
    before, seen = 0, set()
    steps = 3 * stream.pool_size // 7
    for step in range(steps):
        batch = stream.candidates(step)
        repeats = 0
        for domain, id in zip(batch.domains, batch.ids.tolist(), strict=True):
            repeats += id in seen
            seen.add(id)
            shown[domain].append(id)
        assert stream.repeats(step) == repeats
        before += repeats
    assert before > 0
    for domain, size in zip(stream.domains, stream.sizes, strict=True):
        epochs = [shown[domain][start : start + size] for start in range(0, len(shown[domain]), size)]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
        if len(epochs) > 2:
            assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]


def test_domains_come_in_their_shares(corpus, steps=1500, buffer=8):
    stream = CandidateStream(corpus, 16, buffer, seed=0)
    counts = Counter(domain for step in range(steps) for domain in stream.candidates(step).domains)
    n = steps * buffer
    for domain, share in SPEC.shares:
        assert abs(counts[domain] / n - share) < FIVE_SIGMA * math.sqrt(share * (1 - share) / n)


def test_the_pool_holds_every_sequence_once_under_its_id(corpus):
    stream = CandidateStream(corpus, 32, 16, seed=0)
    batches = list(stream.pool(50))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(stream.pool_size))
    tokens = torch.cat([batch.tokens for batch in batches])
    domains = [domain for batch in batches for domain in batch.domains]
    assert torch.equal(tokens, torch.cat([corpus.sequences("train", domain, 32) for domain in corpus.domains]))
    batch = stream.candidates(40)
    assert torch.equal(batch.tokens, tokens[batch.ids])
    assert list(batch.domains) == [domains[i] for i in batch.ids]
    assert batch.quality.tolist() == [QUALITY[domain] for domain in batch.domains]


def test_take_keeps_the_labels_with_their_sequences(corpus):
    batch = CandidateStream(corpus, 16, 8, seed=0).candidates(0)
    part = batch.take(torch.tensor([5, 0]))
    assert len(part) == 2 and part.domains == (batch.domains[5], batch.domains[0])
    assert torch.equal(part.tokens, batch.tokens[[5, 0]]) and torch.equal(part.ids, batch.ids[[5, 0]])
    assert same(part, batch.take([5, 0]))


def test_the_proxy_is_target_text_without_repeats_and_a_pure_function(corpus):
    stream = ProxyStream(corpus, 16, 10, seed=1)
    batch = stream.proxy(4)
    assert batch.shape == (10, 16)
    whole = ProxyStream(corpus, 16, stream.available, seed=1).proxy(0)
    assert len(whole.unique(dim=0)) == stream.available
    held = {tuple(row) for row in corpus.sequences("proxy", "encyclopedia", 16).tolist()}
    assert {tuple(row) for row in batch.tolist()} <= held
    assert torch.equal(ProxyStream(corpus, 16, 10, seed=1).proxy(4), batch)
    assert not torch.equal(stream.proxy(5), batch)
    assert not torch.equal(ProxyStream(corpus, 16, 10, seed=2).proxy(4), batch)


def rows_of(sequences):
    return {tuple(row) for row in sequences.tolist()}


def held_out(corpus, length):
    """The sequences that a proxy of the mixture may hold, by domain."""
    split = {domain: "validation" for domain in corpus.domains} | {corpus.spec.target: "proxy"}
    return {domain: rows_of(corpus.sequences(split[domain], domain, length)) for domain in corpus.domains}


def test_the_pools_proxy_is_held_out_text_in_the_pools_shares(corpus, steps=400, size=10):
    stream, allowed = PoolProxyStream(corpus, 24, size, seed=0), held_out(corpus, 24)
    counts, seen = Counter(), set()
    for step in range(steps):
        batch = stream.proxy(step)
        assert batch.shape == (size, 24) and batch.dtype == torch.long
        domains = [[d for d in corpus.domains if tuple(row) in allowed[d]] for row in batch.tolist()]
        assert all(len(found) == 1 for found in domains)
        counts.update(found[0] for found in domains)
        seen |= rows_of(batch)
    for domain, share in SPEC.shares:
        assert abs(counts[domain] / (steps * size) - share) < FIVE_SIGMA * math.sqrt(share * (1 - share) / steps / size)
    target = corpus.spec.target
    never = [("validation", target), *((split, d) for d in corpus.domains for split in ("train", "evaluation"))]
    assert all(seen.isdisjoint(rows_of(corpus.sequences(*shard, 24))) for shard in never)


def test_the_pools_proxy_is_a_pure_function_of_seed_and_step(corpus):
    stream = PoolProxyStream(corpus, 16, 10, seed=1)
    batches = [stream.proxy(step) for step in range(5)]
    fresh = PoolProxyStream(corpus, 16, 10, seed=1)
    assert all(torch.equal(fresh.proxy(step), batches[step]) for step in (4, 0, 2))
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(PoolProxyStream(corpus, 16, 10, seed=2).proxy(0), batches[0])


def test_the_pools_proxy_repeats_nothing_before_a_domain_is_used_up(corpus):
    allowed = held_out(corpus, 16)
    sizes = {domain: len(rows) for domain, rows in allowed.items()}
    size = 4 * sum(sizes.values())
    rows = [tuple(row) for row in PoolProxyStream(corpus, 16, size, seed=0).proxy(0).tolist()]
    used_up = 0
    for domain, share in SPEC.shares:
        counts = Counter(row for row in rows if row in allowed[domain])
        taken = sum(counts.values())
        assert {*counts.values()} <= {taken // sizes[domain], -(-taken // sizes[domain])}
        used_up += taken > sizes[domain]
    assert used_up


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda c: CandidateStream(c, 16, 0, 0), "buffer is 0"),
        (lambda c: CandidateStream(c, 0, 4, 0), "length is 0"),
        (lambda c: CandidateStream(c, 16, 4, -1), "seed is -1"),
        (lambda c: CandidateStream(c, 10**6, 4, 0), "1000000 tokens does not fit train/encyclopedia"),
        (lambda c: CandidateStream(c, 16, 4, 0).candidates(-1), "step is -1"),
        (lambda c: next(CandidateStream(c, 16, 4, 0).pool(0)), "size is 0"),
        (lambda c: ProxyStream(c, 16, 0, 0), "size is 0"),
        (lambda c: ProxyStream(c, 16, 10**6, 0), "proxy of 1000000 sequences"),
        (lambda c: ProxyStream(c, 16, 4, 0).proxy(-2), "step is -2"),
        (lambda c: PoolProxyStream(c, 16, 0, 0), "size is 0"),
        (lambda c: PoolProxyStream(c, 16, 4, -1), "seed is -1"),
        (lambda c: PoolProxyStream(c, 16, 4, 0).proxy(-2), "step is -2"),
        (lambda c: PoolProxyStream(c, 10**6, 4, 0), "1000000 tokens does not fit"),
    ],
)
def test_a_stream_that_cannot_run_is_refused(corpus, build, message):
    with pytest.raises(CorpusError, match=message):
        build(corpus)


def test_streams_leave_every_global_generator_alone(corpus):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    CandidateStream(corpus, 16, 8, 0).candidates(2)
    ProxyStream(corpus, 16, 4, 0).proxy(2)
    PoolProxyStream(corpus, 16, 4, 0).proxy(2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
