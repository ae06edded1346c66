"""Text to shards: the same bytes whatever the workers and interruptions, and refusals before the work."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from opus_bench import archives, cli
from opus_bench.pools import blocks as pool_blocks
from opus_bench.pools import build as pool_build
from opus_bench.archives import CorpusError
from opus_bench.pools.pool import ShardPool
from opus_bench.pools.build import build_pool
from opus_bench.pools.spec import PoolSpec
from opus_bench.pools.shards import read_mask, read_shard
from opus_bench.pools.tokenizing import load_tokenizer
from opus_bench.pools.web import list_files, parse_source, read_batches

END = 256
ROWS = {  # by file: (score, text); a character is a token, a document has one more
    "b.parquet": [(3, "seven c"), (4, "four"), (2, "left out"), (5, "é"), (3, "")],
    "a.parquet": [(k % 3 + 3, f"document {k:03d}") for k in range(40)],
    "c/d.parquet": [(5, f"last {k}") for k in range(7)],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte a token, and the end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)} | {"<|endoftext|>": END}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.enable_truncation(3)  # must not cut documents
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edu")
    for name, rows in ROWS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        table = pandas.DataFrame({"text": [text for _, text in rows], "int_score": [score for score, _ in rows],
                                  "prompt": [f"p{score}" for score, _ in rows]})
        table.to_parquet(folder / name, row_group_size=16)
    return folder


@pytest.fixture
def spec(texts, tokenizer):
    return PoolSpec((f"fineweb-edu={texts}",), str(tokenizer), tokens=10_000, shard_characters=100)


def content(folder):
    """Every file of a folder with its bytes, but the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def decoded(folder, domain, tokenizer):
    """The documents of a domain, by way of the shards."""
    manifest = json.loads((folder / "manifest.json").read_text())
    made = Tokenizer.from_file(str(tokenizer))
    tokens = np.concatenate([read_shard(folder / s["file"]) for s in manifest["shards"] if s["domain"] == domain])
    assert tokens[-1] == END
    parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]
    return [made.decode(part[part != END].tolist()) for part in parts]


def documents(scores):
    return [text for name in sorted(ROWS) for score, text in ROWS[name] if score in scores and text]


@pytest.fixture(scope="module")
def finished(texts, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("pool")
    build_pool(PoolSpec((f"fineweb-edu={texts}",), str(tokenizer), tokens=10_000, shard_characters=100), out,
               progress=False)
    return out


def test_documents_come_out_whole_in_order_and_by_bucket(finished, tokenizer):
    assert decoded(finished, "fineweb-edu-3", tokenizer) == documents((3,))
    assert decoded(finished, "fineweb-edu-4-5", tokenizer) == documents((4, 5))
    manifest = json.loads((finished / "manifest.json").read_text())
    for domain, scores in (("fineweb-edu-3", (3,)), ("fineweb-edu-4-5", (4, 5))):
        want = documents(scores)
        counts = manifest["domains"][domain]
        assert counts["documents"] == len(want)
        assert counts["tokens"] == sum(len(text.encode()) + 1 for text in want)
        assert counts["shards"] == len(list((finished / domain).glob("*.bin"))) > 2
    assert manifest["tokenizer"]["vocab_size"] == 257
    assert not (finished / "plan.json").exists() and not (finished / "blocks").exists()
    beside = json.loads((finished / "fineweb-edu-3/00000-0000.json").read_text())
    assert beside["source_file"] == "a.parquet" and beside["rows"] == [0, 9]  # 9 of 12 characters reach 100


def test_a_finished_pool_is_read_as_candidates(finished):
    pool = ShardPool(finished)
    batch = pool.candidates(0, 4, 10, seed=0)
    assert batch.tokens.shape == (4, 10) and int(batch.tokens.max()) <= END
    assert pool.vocab_size == 257
    assert torch.equal(batch.tokens, ShardPool(finished / "manifest.json").candidates(0, 4, 10, seed=0).tokens)


def test_two_workers_write_the_bytes_of_one(finished, spec, tmp_path):
    build_pool(spec, tmp_path / "two", workers=2, progress=False)
    assert content(tmp_path / "two") == content(finished)


def test_an_error_of_a_worker_is_told_here(texts, tokenizer, tmp_path):
    spec = PoolSpec((f"mine={texts}",), str(tokenizer), text_field="txt")
    job = pool_blocks.Job(str(tmp_path), spec, spec.parsed[0], {"url": str(texts / "a.parquet")}, 0, 0, 0, ("mine",))
    with pytest.raises(CorpusError, match="a.parquet has no column 'txt' but 'text', 'int_score', 'prompt'; give"):
        next(pool_blocks.records(iter([job]), 2, tokenizer))


# Sources that break, workers that die ------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """Rows from memory in place of files, and a switch that makes the source raise after so many rows."""
    limit = {"rows": None}

    def rows(url, columns, start=0):
        for number, (score, text) in enumerate(ROWS[url]):
            if number >= start:
                if limit["rows"] == 0:
                    raise CorpusError(f"cannot read {url} (ConnectionError: no route)")
                if limit["rows"] is not None:
                    limit["rows"] -= 1
                yield [{"text": text, "int_score": score}]

    def files(source, digest=True):
        return "0123abc", [{"name": name, "url": name, "bytes": 1, "sha256": None} for name in sorted(ROWS)]

    monkeypatch.setattr(pool_blocks, "read_batches", rows)
    monkeypatch.setattr(pool_build, "list_files", files)
    return limit


@pytest.fixture
def fake_spec(tokenizer):
    return PoolSpec(("fineweb-edu",), str(tokenizer), tokens=150, shard_characters=100)


def test_a_source_that_breaks_leaves_what_is_finished_and_the_same_call_goes_on(fake, fake_spec, tmp_path):
    build_pool(fake_spec, tmp_path / "whole", progress=False)
    fake["rows"] = 20
    with pytest.raises(CorpusError, match="cannot read a.parquet .*no route"):
        build_pool(fake_spec, tmp_path / "broken", progress=False)
    kept = content(tmp_path / "broken")
    assert "fineweb-edu-3/00000-0001.bin" in kept and "manifest.json" not in kept  # rows 9 to 18
    with pytest.raises(CorpusError, match="the pool is unfinished"):
        ShardPool(tmp_path / "broken")
    times = {name: (tmp_path / "broken" / name).stat().st_mtime_ns for name in kept if name.endswith(".bin")}
    fake["rows"] = None
    build_pool(fake_spec, tmp_path / "broken", progress=False)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    assert all((tmp_path / "broken" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_kill_before_or_after_any_write_changes_nothing_in_the_end(fake, fake_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    build_pool(fake_spec, tmp_path / "whole", progress=False)
    want, replace = content(tmp_path / "whole"), os.replace
    out = tmp_path / "killed"

    def die_at(count, after):
        def dying(*names):
            nonlocal count
            count -= 1
            if count == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying
        build_pool(fake_spec, out, progress=False)

    deaths = 0
    for turn in range(100):  # a block takes five writes, so some turns get no further and some do
        process = multiprocessing.get_context("fork").Process(target=die_at, args=(1 + turn % 7, turn % 2 == 0))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    assert 10 < deaths < 99
    assert content(out) == want


def test_the_pool_is_the_first_blocks_that_reach_the_goal_of_each_domain(fake, fake_spec, tmp_path):
    build_pool(fake_spec, tmp_path, progress=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for domain in fake_spec.parsed[0].domains:
        sizes = [shard["tokens"] for shard in manifest["shards"] if shard["domain"] == domain]
        assert sum(sizes[:-1]) < 150 <= sum(sizes)
    (source,) = manifest["sources"]
    assert [file["name"] for file in source["files"]] == ["a.parquet"]


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-2]),
                                  lambda path: path.write_bytes(path.read_bytes()[:-2] + b"zz")])
def test_the_same_call_on_a_finished_pool_makes_a_damaged_shard_again(fake, fake_spec, tmp_path, harm):
    build_pool(fake_spec, tmp_path, progress=False)
    want = content(tmp_path)
    harm(tmp_path / "fineweb-edu-4-5/00000-0001.bin")
    (tmp_path / "fineweb-edu-3/.left.tmp").write_text("of an interrupted write")
    build_pool(fake_spec, tmp_path, progress=False)
    assert content(tmp_path) == want


def test_a_shard_that_its_source_does_not_give_again_is_an_error(fake, fake_spec, tmp_path, monkeypatch):
    build_pool(fake_spec, tmp_path, progress=False)
    (tmp_path / "fineweb-edu-3/00000-0000.bin").unlink()
    monkeypatch.setitem(ROWS, "a.parquet", [(3, "another text")] * 40)
    with pytest.raises(CorpusError, match="3/00000-0000.bin of .* is damaged and a.parquet does not give it again"):
        build_pool(fake_spec, tmp_path, progress=False)


def test_other_settings_in_the_same_folder_are_refused(fake, fake_spec, tmp_path):
    fake["rows"] = 20
    with pytest.raises(CorpusError, match="no route"):
        build_pool(fake_spec, tmp_path, progress=False)
    other = PoolSpec(fake_spec.sources, fake_spec.tokenizer, tokens=151, shard_characters=100)
    with pytest.raises(CorpusError, match="plan.json was begun with tokens 150, not 151; give the same options"):
        build_pool(other, tmp_path, progress=False)
    fake["rows"] = None
    build_pool(fake_spec, tmp_path, progress=False)
    with pytest.raises(CorpusError, match="manifest.json was begun with tokens 150, not 151"):
        build_pool(other, tmp_path, progress=False)


def test_options_may_change_while_nothing_is_finished(fake, fake_spec, tmp_path):
    fake["rows"] = 5
    with pytest.raises(CorpusError, match="no route"):
        build_pool(fake_spec, tmp_path, progress=False)
    fake["rows"] = None
    build_pool(PoolSpec(("fineweb-edu",), fake_spec.tokenizer, tokens=1, shard_characters=50), tmp_path, progress=False)
    assert len(list(tmp_path.rglob("*.bin"))) == 2


def test_a_second_run_in_the_folder_is_refused(fake, fake_spec, tmp_path):
    with pool_build.FileLock(tmp_path / ".lock"), pytest.raises(CorpusError, match="another run is making a pool in"):
        build_pool(fake_spec, tmp_path, progress=False)


def test_a_local_file_that_changes_in_between_is_refused(spec, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_blocks, "read_batches", lambda *_: iter([[]]))
    copy = tmp_path / "edu.jsonl"
    copy.write_text('{"text": "a"}\n')
    mine = PoolSpec((f"mine={copy}",), spec.tokenizer)
    with pytest.raises(CorpusError, match="the sources hold no text of mine; look at --text-field"):
        build_pool(mine, tmp_path / "out", progress=False)
    copy.write_text('{"text": "b"}\n')
    with pytest.raises(CorpusError, match="edu.jsonl is missing or has changed since .* was begun; restore it"):
        build_pool(mine, tmp_path / "out", progress=False)


# Documents, prompts, tokens ----------------------------------------------------------------------


def test_prompts_stand_before_their_text_and_do_not_count(tokenizer, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"text": "abc", "q": "what?"}\n{"text": "d", "q": null}\n')
    spec = PoolSpec((str(tmp_path / "qa.jsonl"),), str(tokenizer), prompt_field="q")
    build_pool(spec, tmp_path / "out", progress=False)
    path = tmp_path / "out/qa/00000-0000.bin"
    text = Tokenizer.from_file(str(tokenizer)).decode(read_shard(path).tolist())
    assert text == "what?abc<|endoftext|>d<|endoftext|>"
    assert read_mask(path, 11).tolist() == [False] * 5 + [True] * 6
    batch = ShardPool(tmp_path / "out").sequences([0], 11)
    assert batch.counted().sum() == 6  # of 10 targets


def test_the_marker_inside_a_text_is_text_and_ends_no_document(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a<|endoftext|>b"}) + "\n")
    build_pool(PoolSpec((str(tmp_path / "x.jsonl"),), str(tokenizer)), tmp_path / "out", progress=False)
    tokens = read_shard(tmp_path / "out/x/00000-0000.bin")
    assert (tokens == END).sum() == 1 and len(tokens) == 16


def test_a_large_vocabulary_gives_uint32(tmp_path):
    vocab = {"<|endoftext|>": 70_000, "a": 69_999, "[UNK]": 0}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}\n')
    build_pool(PoolSpec((str(tmp_path / "x.jsonl"),), str(tmp_path)), tmp_path / "out", progress=False)
    tokens = read_shard(tmp_path / "out/x/00000-0000.bin")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [69_999, 0, 70_000]


@pytest.mark.network
def test_gpt2_is_the_published_tokenizer():
    tokenizer = load_tokenizer("gpt2", progress=False)
    assert tokenizer.encode("Hello world, it's 2024").ids == [15496, 995, 11, 340, 338, 48609]
    assert tokenizer.token_to_id("<|endoftext|>") == 50256 and tokenizer.get_vocab_size() == 50257


# Sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,subset,name,place", [
    ("fineweb", "sample-100BT", "fineweb", "hf://datasets/HuggingFaceFW/fineweb@main/sample/100BT"),
    ("fineweb-edu", "default", "fineweb-edu", "hf://datasets/HuggingFaceFW/fineweb-edu@main/data"),
    ("fineweb", "CC-MAIN-2024-10", "fineweb", "hf://datasets/HuggingFaceFW/fineweb@main/data/CC-MAIN-2024-10"),
    ("sciencepedia=hf://datasets/o/n", "x", "sciencepedia", "hf://datasets/o/n@main"),
    ("hf://datasets/o/n@v1/a/b", "x", "b", "hf://datasets/o/n@v1/a/b"),
    ("hf://datasets/o/n@refs/convert/parquet/en", "x", "en", "hf://datasets/o/n@refs/convert/parquet/en"),
    ("/data/wiki.jsonl.gz", "x", "wiki", "/data/wiki.jsonl.gz"),
    ("fineweb-edu=/copy", "x", "fineweb-edu", "/copy"),
])
def test_sources_by_their_words(text, subset, name, place):
    source = parse_source(text, subset, "main")
    assert (source.name, source.place) == (name, place)


@pytest.mark.parametrize("options,message", [
    ({"sources": ()}, "no source given"),
    ({"sources": ("sciencepedia",)}, "no public copy that we know of; give sciencepedia=FOLDER"),
    ({"sources": ("x=hf://o/n",)}, "'hf://o/n' is not hf://datasets/OWNER/NAME"),
    ({"sources": ("a b=/x",)}, "'a b' cannot be a domain's name"),
    ({"sources": ("/x/a", "/y/a")}, "two sources are named 'a'"),
    ({"sources": ("fineweb",), "tokens": 0}, "tokens is 0"),
    ({"sources": ("fineweb-edu",), "domains": ("fineweb-edu",)}, "known: fineweb-edu-3, fineweb-edu-4-5"),
])
def test_a_wrong_spec_is_refused_before_anything_is_reached(options, message):
    with pytest.raises(CorpusError, match=message):
        PoolSpec(**options)


def test_files_come_in_the_order_of_their_names_with_their_digests(texts, tmp_path):
    commit, files = list_files(parse_source(str(texts), "x", "main"))
    assert commit is None
    assert [file["name"] for file in files] == ["a.parquet", "b.parquet", "c/d.parquet"]
    assert files[1]["sha256"] == archives.file_sha256(texts / "b.parquet")
    with pytest.raises(CorpusError, match="no .parquet, .jsonl, .json file in"):
        list_files(parse_source(str(tmp_path), "x", "main"))
    with pytest.raises(CorpusError, match="/nowhere does not exist, and is not one of fineweb, fineweb-edu, science"):
        list_files(parse_source("/nowhere", "x", "main"))


def test_hub_files_are_pinned_to_the_commit_of_the_branch(monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    class Api:
        def dataset_info(self, repo, revision):
            assert (repo, revision) == ("HuggingFaceFW/fineweb", "main")
            return SimpleNamespace(sha="c0ffee")

        def list_repo_tree(self, repo, folder, recursive, revision, repo_type):
            assert (folder, recursive, revision, repo_type) == ("sample/10BT", True, "c0ffee", "dataset")
            for name in ("sample/10BT/001.parquet", "sample/10BT/000.parquet", "sample/10BT/README.md"):
                yield RepoFile(path=name, size=7, oid="o", lfs={"size": 7, "oid": "5a", "pointerSize": 1})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("opus_bench.evaluation.paper_suite.hub_problem", lambda: None)
    commit, files = list_files(parse_source("fineweb", "sample-10BT", "main"))
    assert commit == "c0ffee"
    assert [file["url"] for file in files] == [f"hf://datasets/HuggingFaceFW/fineweb@c0ffee/sample/10BT/00{k}.parquet"
                                               for k in (0, 1)]
    assert files[0] == {"name": "sample/10BT/000.parquet", "url": files[0]["url"], "bytes": 7, "sha256": "5a"}


@pytest.mark.parametrize("start", [0, 5, 16, 39, 40])
def test_reading_from_a_row_gives_the_rest(texts, start):
    rows = [row for batch in read_batches(str(texts / "a.parquet"), ("text", "int_score"), start) for row in batch]
    assert rows == [{"text": text, "int_score": score} for score, text in ROWS["a.parquet"][start:]]


@pytest.mark.parametrize("name,data", [("x.parquet", b"PAR1 but no more"), ("x.jsonl", b'{"text": "a"}\n{"text": \n')])
def test_damaged_files_are_refused_by_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=f"cannot read .*{name} "):
        list(read_batches(str(tmp_path / name), ("text",)))


# The command -------------------------------------------------------------------------------------


def test_the_command_prints_what_it_made_and_what_is_short(texts, tokenizer, tmp_path, capsys):
    words = ["data", "--source", f"fineweb-edu={texts}", "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"),
             "--domains", "fineweb-edu-3", "--tokens", "1e6"]
    assert cli.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "fineweb-edu-3" in printed and "fineweb-edu-4-5" not in printed
    assert "dry run: nothing was written" in printed and not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    total = sum(len(text) + 1 for text in documents((3,)))
    assert f"fineweb-edu-3: {total} of 1,000,000 tokens, the source has no more" in printed


def test_a_dry_run_estimates_what_is_there(texts, tokenizer):
    from opus_bench.pools.command import estimate

    spec = PoolSpec((f"mine={texts / 'a.parquet'}",), str(tokenizer), tokens=100)
    (_, found, note), = estimate(spec)
    assert found["mine"]["available"] == pytest.approx(40 * 13)  # exact: the sample is the whole file
    assert (found["mine"]["files"], found["mine"]["disk_bytes"]) == (1, 200)
    assert "estimated from 40 documents of a.parquet" in note


def test_a_hub_out_of_reach_is_one_line_before_anything_starts(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("opus_bench.evaluation.paper_suite.hub_problem", lambda: "ConnectError: no route")
    for more in ([], ["--dry-run"]):
        words = ["data", "--source", "fineweb", "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), *more]
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "the hub cannot be reached (ConnectError: no route)" in error
        assert "give fineweb=FOLDER with a copy" in error
    assert not (tmp_path / "out/plan.json").exists()


def test_a_tokenizer_without_the_token_or_without_a_place(tmp_path, tokenizer, texts, monkeypatch):
    with pytest.raises(CorpusError, match="has no token '</s>'; give --end-of-text"):
        build_pool(PoolSpec((str(texts),), str(tokenizer), end_of_text="</s>"), tmp_path, progress=False)
    monkeypatch.setattr("opus_bench.evaluation.paper_suite.hub_problem", lambda: "no route")
    with pytest.raises(CorpusError, match=r"tokenizer 'Qwen/Qwen3-8B-Base' is no file .* \(no route\); give gpt2"):
        load_tokenizer("Qwen/Qwen3-8B-Base")
    with monkeypatch.context() as cached:  # fetched before, and the hub does not answer
        cached.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(tokenizer))
        assert load_tokenizer("Qwen/Qwen3-8B-Base").to_str() == load_tokenizer(str(tokenizer)).to_str()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="tokenizer.json is no tokenizer.json"):
        load_tokenizer(str(tmp_path))
