"""The .bin format byte by byte, refusals, and the pool as a pure function of (seed, step)."""

import json
import struct

import numpy as np
import pytest
import torch

from opus_bench.archives import CorpusError, file_sha256
from opus_bench.pools.pool import ShardPool
from opus_bench.pools.shards import json_bytes, read_mask, read_shard, token_dtype, write_shard

LENGTH = 4
SIZES = {"a/0.bin": 23, "a/1.bin": 8, "b/0.bin": 17}  # 5, 2 and 4 sequences of 4 tokens


@pytest.mark.parametrize("dtype,code,magic,version", [("uint16", "H", 20240520, 1), ("uint32", "I", 20240801, 7)])
def test_a_shard_is_llm_c_s_format_byte_for_byte(tmp_path, dtype, code, magic, version):
    path, tokens = tmp_path / "x.bin", [5, 0, 2 ** (8 * struct.calcsize(code)) - 1]
    metadata = write_shard(path, np.array(tokens, dtype=dtype), about={"documents": 1})
    want = struct.pack("<256i", magic, version, 3, *[0] * 253) + struct.pack(f"<3{code}", *tokens)
    assert path.read_bytes() == want
    assert read_shard(path).tolist() == tokens
    assert metadata["sha256"] == file_sha256(path)
    assert json.loads((tmp_path / "x.json").read_text()) == metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.json"]


def test_the_vocabulary_decides_the_width():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == token_dtype(151_936) == np.uint32


def test_a_mask_is_kept_only_where_something_does_not_count(tmp_path):
    tokens, mask = np.arange(4, dtype=np.uint16), np.array([False, True, True, False])
    write_shard(tmp_path / "all.bin", tokens, mask | True)
    assert read_mask(tmp_path / "all.bin", 4) is None
    metadata = write_shard(tmp_path / "some.bin", tokens, mask)
    assert read_mask(tmp_path / "some.bin", 4).tolist() == mask.tolist()
    assert metadata["mask_sha256"] == file_sha256(tmp_path / "some.mask")
    (tmp_path / "some.mask").write_bytes(b"\1")
    with pytest.raises(CorpusError, match=r"some.mask is cut short or damaged: 4 tokens, 1 bytes; delete"):
        read_mask(tmp_path / "some.bin", 4)


@pytest.mark.parametrize("tokens,mask,message", [
    (np.arange(3), None, "must be flat uint16 or uint32, got int64"),
    (np.zeros((2, 2), np.uint16), None, r"of shape \(2, 2\)"),
    (np.zeros(0, np.uint16), None, "0 tokens; a shard holds 1 to 2147483647"),
    (np.zeros(2, np.uint16), np.ones(3, bool), r"mask is bool of shape \(3,\)"),
])
def test_what_is_no_shard_is_not_written(tmp_path, tokens, mask, message):
    with pytest.raises(CorpusError, match=message):
        write_shard(tmp_path / "x.bin", tokens, mask)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change,message", [
    (lambda data: data[:-1], r"x.bin is cut short or damaged: 9 tokens need 1042 bytes, it has 1041; delete it"),
    (lambda data: data + b"\0\0", "cut short or damaged"),
    (lambda data: data[:100], "x.bin is no token shard: 100 bytes, the header alone has 1024; give a .bin"),
    (lambda data: b"", "no token shard: 0 bytes"),
    (lambda data: struct.pack("<i", 20240522) + data[4:], "magic 20240522, version 1; known are 20240520 1, 2024"),
    (lambda data: data[:4] + struct.pack("<i", 7) + data[8:], "magic 20240520, version 7"),
    (lambda data: data[:8] + struct.pack("<i", -9) + data[12:], "cut short or damaged: -9 tokens"),
])
def test_cut_damaged_and_foreign_files_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "x.bin"
    write_shard(path, np.arange(9, dtype=np.uint16))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorpusError, match=message):
        read_shard(path)


# The pool ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Tokens count on through the shards, so that a token tells where it stands."""
    shards, start = [], 0
    for name, size in SIZES.items():
        tokens = np.arange(start, start + size, dtype=np.uint16)
        mask = np.arange(size) % 3 > 0 if name == "b/0.bin" else None
        shards.append({**write_shard(tmp_path / name, tokens, mask, {"documents": 1}), "file": name, "domain": name[0]})
        start += size
    manifest = {"format": 1, "shards": shards, "domains": {"a": {}, "b": {}}, "sha256": "0" * 64,
                "tokenizer": {"vocab_size": 300}}
    (tmp_path / "manifest.json").write_bytes(json_bytes(manifest))
    return tmp_path


STARTS = [0, 4, 8, 12, 16, 23, 27, 31, 35, 39, 43]  # first token of every sequence, by hand from SIZES


def test_the_sequences_are_those_of_the_shards_in_order_and_never_cross_one(folder):
    pool = ShardPool(folder)
    assert (pool.sequence_count(LENGTH), pool.token_count, pool.domains) == (11, 48, ("a", "b"))
    tokens = pool.sequences(range(11), LENGTH).tokens
    assert tokens.tolist() == [[start + k for k in range(LENGTH)] for start in STARTS]
    assert pool.domain_names(range(11), LENGTH) == ("a",) * 7 + ("b",) * 4
    assert ShardPool(folder, ["b"]).sequences([0], LENGTH).tokens.tolist() == [[31, 32, 33, 34]]


def test_no_sequence_comes_back_before_all_were_shown_and_every_epoch_has_its_order(folder):
    pool = ShardPool(folder)
    shown = torch.cat([pool.ids(step, 3, LENGTH, seed=1) for step in range(11)]).view(3, 11)
    assert all(sorted(epoch.tolist()) == list(range(11)) for epoch in shown)
    assert len({tuple(epoch.tolist()) for epoch in shown}) == 3
    assert not torch.equal(shown[0], torch.cat([pool.ids(0, 11, LENGTH, seed=2)]))


def test_candidates_are_a_function_of_seed_and_step_alone(folder):
    pool, fresh = ShardPool(folder), ShardPool(folder, verify=False)
    for step in (9, 0, 4):
        got = pool.candidates(step, 5, LENGTH, seed=3)
        again = fresh.candidates(step, 5, LENGTH, seed=3)
        assert torch.equal(got.tokens, again.tokens) and torch.equal(got.loss_mask, again.loss_mask)
        assert torch.equal(got.tokens, pool.sequences(pool.ids(step, 5, LENGTH, 3), LENGTH).tokens)
        assert got.tokens.dtype == torch.int64


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_global_buffer(folder, world):
    pool = ShardPool(folder)
    whole = pool.candidates(2, 8, LENGTH, seed=0)
    parts = [pool.candidates(2, 8, LENGTH, 0, rank, world) for rank in range(world)]
    assert [len(part) for part in parts] == [8 // world] * world
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.loss_mask for part in parts]), whole.loss_mask)


def test_masks_follow_their_tokens_and_others_count(folder):
    batch = ShardPool(folder).sequences([0, 7, 8], LENGTH)
    counted = [[True] * 4, [False, True, True, False], [True, True, False, True]]  # b starts at 31: 0, 3, 6 are out
    assert batch.loss_mask.tolist() == counted
    assert ShardPool(folder, ["a"]).sequences([0], LENGTH).loss_mask is None


def test_more_shards_than_may_be_open(folder, monkeypatch):
    want = ShardPool(folder).sequences(range(11), LENGTH).tokens
    monkeypatch.setattr("opus_bench.pools.pool.OPEN_SHARDS", 1)
    pool = ShardPool(folder)
    assert torch.equal(pool.sequences(range(11), LENGTH).tokens, want)
    assert pool._map.cache_info().currsize == 1


def test_shards_made_elsewhere_need_no_manifest(folder):
    pool = ShardPool.of_files([folder / "b/0.bin", folder / "a/1.bin"])
    assert pool.sequences([0, 4], LENGTH).tokens[:, 0].tolist() == [31, 23]
    assert pool.domains == ("b", "a") and pool.sha256 is None
    with pytest.raises(CorpusError, match="no shards given"):
        ShardPool.of_files([])


def test_a_changed_byte_is_found_unless_only_sizes_are_asked_for(folder):
    path = folder / "a/1.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a/1.bin is damaged \(its sha256 is not that of its metadata\); delete it"):
        ShardPool(folder)
    assert len(ShardPool(folder, verify=False).candidates(0, 2, LENGTH, 0)) == 2
    write_shard(path, np.arange(7, dtype=np.uint16))
    with pytest.raises(CorpusError, match="a/1.bin is another shard: it has 7 uint16 tokens, its metadata says 8"):
        ShardPool(folder, verify=False)
    path.unlink()
    with pytest.raises(CorpusError, match="a/1.bin cannot be read"):
        ShardPool(folder, verify=False)


def test_a_lost_mask_is_noticed(folder):
    (folder / "b/0.mask").unlink()
    with pytest.raises(CorpusError, match="b/0.mask is missing; delete the shard"):
        ShardPool(folder, verify=False)


@pytest.mark.parametrize("call,message", [
    (lambda pool: pool.candidates(-1, 2, 4, 0), "step is -1"),
    (lambda pool: pool.candidates(0, 0, 4, 0), "size is 0"),
    (lambda pool: pool.candidates(0, 2, 0, 0), "length is 0"),
    (lambda pool: pool.candidates(0, 2, 4, -1), "seed is -1"),
    (lambda pool: pool.candidates(0, 2, 24, 0), "24 tokens does not fit a shard of the pool, whose largest has 23"),
    (lambda pool: pool.candidates(0, 6, 4, 0, 0, 4), "6 candidates do not fall evenly to rank 0 of 4"),
    (lambda pool: pool.candidates(0, 4, 4, 0, 2, 2), "rank 2 of 2"),
    (lambda pool: pool.sequences([11], 4), "ids run from 11 to 11; the pool has 0 to 10 of 4 tokens"),
    (lambda pool: ShardPool(pool.files[0].parent.parent, ["c"]), "no domain 'c'; known: a, b"),
])
def test_errors_name_the_value(folder, call, message):
    with pytest.raises(CorpusError, match=message):
        call(ShardPool(folder))


def test_an_unfinished_pool_is_not_read(folder):
    (folder / "manifest.json").rename(folder / "plan.json")
    with pytest.raises(CorpusError, match="unfinished or none; run the same `opus-bench data` command again"):
        ShardPool(folder)
    (folder / "plan.json").rename(folder / "manifest.json")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CorpusError, match="is not the manifest of a pool"):
        ShardPool(folder)
