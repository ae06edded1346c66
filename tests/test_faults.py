"""Faults put upon runs and grids: the same command then ends with the same record, bit for bit.

A record's outcome holds losses, the hash of the choices and the hash of the weights.  `python -m tests.faults`
runs these tests and writes what it counted to docs/faults.md.
"""

import errno
import http.server
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import faults
import pytest
import torch
from fake_corpus import SPEC
from fault_runs import (CONTEXT, OPUS, SCALE, TOY, Trial, full_device, grid, kill_before_write, limit_files,
                        not_a_number, toy)
from small_models import optimizers_for, tokens

from baselines import build_selector
from opus_bench import streamed
from opus_bench.archives import ARCHIVES, CorpusError
from opus_bench.checkpoint import read_whole, beside
from opus_bench.corpus import build_corpus
from opus_bench.report import MARKERS, update_readme
from opus_bench.results import load, outcome
from opus_bench.selector import Opus, TrainState
from opus_bench.train import RunConfig, train, weights_sha256
from reproduce.scales import SCALES

ROOT = Path(__file__).resolve().parent.parent
HOUR = 3600.0


@pytest.fixture(scope="module")
def whole(cache, corpus, tmp_path_factory):
    """Uninterrupted runs: outcome, seconds and number of writes by optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "toy", SCALE)
        yield uninterrupted(cache, tmp_path_factory)


def uninterrupted(cache, tmp_path_factory):
    found = {}
    for optimizer in OPUS:
        trial = Trial(cache, tmp_path_factory.mktemp(optimizer) / "results", optimizer, kill_before_write,
                      options={"n": 0})
        process = trial.start()
        wait_for(trial.log, process)
        started = time.monotonic()
        process.join()
        assert process.exitcode == 0, trial.log.read_text()
        writes = trial.results.with_suffix(".count").stat().st_size
        found[optimizer] = trial.outcome(), time.monotonic() - started, writes
    return found


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive(), "the process ended before it began"
        time.sleep(0.002)


def resumed(trial):
    """The outcome after the same command once more, without a fault."""
    again = Trial(trial.cache, trial.results, trial.optimizer)
    assert again.end() == 0, again.log.read_text()
    return again.outcome()


def note(record_property, trials, recovered):
    record_property("trials", trials)
    record_property("recovered", recovered)
    assert recovered == trials > 0


def test_killed_at_moments_spread_over_the_run(cache, whole, tmp_path, record_property, trials=12):
    draw, recovered = random.Random(0), 0
    for number in range(trials):
        optimizer = list(OPUS)[number % 2]
        want, seconds, _ = whole[optimizer]
        moment, ended = seconds * (number + draw.random()) / trials, 0
        while ended != -signal.SIGKILL:
            trial = Trial(cache, tmp_path / f"{number} at {moment}", optimizer)
            process = trial.start()
            wait_for(trial.log, process)
            time.sleep(moment)
            process.kill()
            process.join()
            ended, moment = process.exitcode, 0.8 * moment  # 0: the run was faster than the one measured
        recovered += resumed(trial) == want
    note(record_property, trials, recovered)


def test_killed_just_before_a_file_is_opened_named_or_deleted(cache, whole, tmp_path, record_property, trials=8):
    draw, recovered = random.Random(1), 0
    for number in range(trials):
        optimizer = list(OPUS)[number % 2]
        want, _, writes = whole[optimizer]
        n = draw.randrange(writes * number // trials, writes * (number + 1) // trials) + 1
        trial = Trial(cache, tmp_path / str(number), optimizer, kill_before_write, options={"n": n})
        assert trial.end() == -signal.SIGKILL
        recovered += resumed(trial) == want
    note(record_property, trials, recovered)


WRITES = [("first checkpoint", 1, 100_000), ("later checkpoint", 5, 100_000), ("record", TOY["steps"], 2_000)]


@pytest.mark.parametrize("what,step,most", WRITES, ids=[name for name, *_ in WRITES])
def test_ended_in_the_middle_of_a_write(cache, whole, tmp_path, record_property, what, step, most):
    draw, recovered = random.Random(step), 0
    for size in (draw.randrange(1, most // 2), draw.randrange(most // 2, most)):
        trial = Trial(cache, tmp_path / str(size), on_step=limit_files,
                      options={"step": step, "size": size, "killed": True})
        assert trial.end() == -signal.SIGXFSZ
        left = [p.stat().st_size for p in trial.results.rglob("*.tmp")]
        assert left == [size]  # half a file, of exactly so many bytes
        recovered += resumed(trial) == whole["adamw"][0]
    note(record_property, 2, recovered)


@pytest.mark.parametrize("what,step,most", WRITES, ids=[name for name, *_ in WRITES])
def test_no_room_for_a_file(cache, whole, tmp_path, record_property, what, step, most):
    size = random.Random(step + 1).randrange(1, most)
    trial = Trial(cache, tmp_path / "results", on_step=limit_files,
                  options={"step": step, "size": size, "killed": False})
    assert trial.end() == 1
    said = trial.log.read_text().splitlines()[-1]
    name = f"{toy(cache).run_id}.json" if what == "record" else "checkpoint.pt"
    assert name in said and "cannot be written (File too large)" in said and "make room" in said
    assert not list(trial.results.rglob("*.tmp")) and not list(trial.results.glob("runs/*.json"))
    note(record_property, 1, resumed(trial) == whole["adamw"][0])


def test_a_device_that_is_full(cache, whole, tmp_path, record_property):
    trial = Trial(cache, tmp_path / "results", before=full_device)
    assert trial.end() == 1
    assert "checkpoint.pt cannot be written (No space left on device)" in trial.log.read_text().splitlines()[-1]
    note(record_property, 1, resumed(trial) == whole["adamw"][0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_ends_the_run_with_its_step(cache, whole, tmp_path, record_property, what):
    trial = Trial(cache, tmp_path / "results", before=not_a_number, options={"step": 5, "what": what})
    assert trial.end() == 1
    said = trial.log.read_text().splitlines()[-1]
    assert f"step 5: the {what}" in said.replace("training ", "").replace("gradient's norm", "gradient")
    assert "is nan" in said and "lower the learning rate" in said
    assert not list(trial.results.glob("runs/*"))
    assert read_whole(trial.work / "checkpoint.pt")["progress"]["step"] == 4
    note(record_property, 1, resumed(trial) == whole["adamw"][0])


# Damaged checkpoints -----------------------------------------------------------------------------


def run(corpus, checkpoint=None, stop=None):
    """(what a run ends with, its first step here)."""
    config = RunConfig("opus", OPUS["adamw"], seed=3, **TOY)
    steps = []

    def on_step(step):
        steps.append(step)
        if step == stop:
            raise InterruptedError

    model, progress = train(config, corpus, build_selector("opus", OPUS["adamw"], corpus, TOY["length"]), checkpoint,
                            on_step)
    return (weights_sha256(model), progress.metrics, progress.selected_sha256, progress.per_step), steps[0]


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """What the run ends with, and a folder with its checkpoints of steps 4 and 2."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedError):
        run(corpus, folder / "checkpoint.pt", stop=5)
    return run(corpus)[0], folder


def cut(share):
    return lambda content: content[: int(share * len(content))]


def flip(place):
    """The byte at a place, given as a share, with its bits turned."""
    def turned(content):
        at = int(place * len(content))
        return content[:at] + bytes([content[at] ^ 255]) + content[at + 1:]

    return turned


DAMAGES = {f"cut to {share}": cut(share) for share in (0, 0.001, 0.5, 0.9, 0.999)} | {
    f"byte at {place} flipped": flip(place) for place in (0, 0.2, 0.4, 0.6, 0.8)} | {
    "zeros": lambda content: bytes(len(content)), "end lost": lambda content: content[:-1],
    "a block lost": lambda content: content[:8192] + bytes(4096) + content[12288:]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(corpus, stopped, tmp_path, record_property, damage):
    want, folder = stopped
    shutil.copytree(folder, tmp_path / "work")
    path = tmp_path / "work" / "checkpoint.pt"
    spoilt = DAMAGES[damage](path.read_bytes())
    path.write_bytes(spoilt)
    with pytest.warns(RuntimeWarning, match=r"checkpoint\.pt is damaged .*lies as checkpoint\.pt\.damaged"):
        got, first = run(corpus, path)
    assert first == 3 and beside(path, ".damaged").read_bytes() == spoilt
    note(record_property, 1, got == want)


def test_with_every_checkpoint_damaged_the_run_starts_anew(corpus, stopped, tmp_path, record_property):
    want, folder = stopped
    shutil.copytree(folder, tmp_path / "work")
    path = tmp_path / "work" / "checkpoint.pt"
    for one in (path, beside(path, ".previous")):
        one.write_bytes(one.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning) as told:
        got, first = run(corpus, path)
    assert [str(w.message).split()[1] for w in told] == [str(path), f"{path}.previous"]
    assert first == 1
    note(record_property, 1, got == want)


def test_a_flipped_byte_is_found_or_changes_nothing(stopped, tmp_path, record_property, trials=300):
    """A zip's padding and time stamps may flip unnoticed; then what is read is what was written."""
    def dump(state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    content, draw, refused, same = (stopped[1] / "checkpoint.pt").read_bytes(), random.Random(0), 0, 0
    want, path = dump(read_whole(stopped[1] / "checkpoint.pt")), tmp_path / "checkpoint.pt"
    for _ in range(trials):
        path.write_bytes(flip(draw.random())(content))
        try:
            same += dump(read_whole(path)) == want
        except ValueError as error:
            refused += f"{path} is damaged" in str(error)
    assert refused > trials / 2
    note(record_property, trials, refused + same)


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(corpus, stopped, tmp_path):
    path = tmp_path / "checkpoint.pt"
    shutil.copy(stopped[1] / "checkpoint.pt", path)
    config = RunConfig("random", **{**TOY, "optimizer": "muon"})
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not one of this run .*delete it to start this run again"):
        train(config, corpus, build_selector("random", {}, corpus, TOY["length"]), path)
    assert path.read_bytes() == (stopped[1] / "checkpoint.pt").read_bytes()


# Memory ------------------------------------------------------------------------------------------


def little_memory(monkeypatch, most):
    """Forwards of more than so many candidates are out of memory; returns the sizes tried."""
    tried = []
    for name in ("stream", "sample_losses"):
        def starved(model, batch, *rest, real=getattr(streamed, name)):
            tried.append(len(batch))
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(model, batch, *rest)

        monkeypatch.setattr(streamed, name, starved)
    return tried


STREAMED = {"exact": ("calibrated", {}), "forward": ("calibrated", {"estimator": "forward"}), "sketch": ("paper", {})}


@pytest.mark.parametrize("estimator", STREAMED)
def test_out_of_memory_halves_the_microbatch(model, monkeypatch, record_property, estimator):
    arm, options = STREAMED[estimator]
    state = TrainState(model, optimizers_for(model, "adamw"), 0, tokens(4, 12, seed=5))
    batch, before = tokens(16, 12), weights_sha256(model)

    def select(**more):
        opus = Opus.arm(arm, window=12, **options, **more)
        return opus, opus.select(batch, 8, state, torch.Generator().manual_seed(0))

    _, unharmed = select()
    _, split = select(microbatch=4)
    tried = little_memory(monkeypatch, 5)
    with pytest.warns(RuntimeWarning, match="out of memory scoring 16 candidates at once; going on with 8"):
        starved, got = select()
    assert tried[:3] == [16, 8, 4] and set(tried[3:]) == {4}
    assert torch.equal(got.utilities, split.utilities) and torch.equal(got.indices, unharmed.indices)
    torch.testing.assert_close(got.utilities, unharmed.utilities, rtol=1e-9, atol=1e-12)
    assert got.diagnostics["out_of_memory"] == "scored 4 candidates at once, since more ran out of memory"
    assert "out_of_memory" not in unharmed.diagnostics and "out_of_memory" not in split.diagnostics
    assert weights_sha256(model) == before and all(not m._forward_hooks for m in model.modules())
    other = Opus.arm(arm, window=12, **options)
    other.load_state_dict(starved.state_dict())
    del tried[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.select(batch, 8, state, torch.Generator())
    assert set(tried) == {4}  # a resumed run does not try what failed
    note(record_property, 1, 1)


def test_a_run_whose_memory_ran_out_says_so_and_is_resumed(corpus, tmp_path, monkeypatch):
    def run(checkpoint=None, stop=None, **options):
        options = {"arm": "calibrated", "window": 12, **options}
        selector = build_selector("opus", options, corpus, TOY["length"])
        model, progress = train(RunConfig("opus", options, **TOY), corpus, selector, checkpoint,
                                lambda step: 1 // (step != stop))
        return weights_sha256(model), progress.metrics, progress.per_step, progress.notes

    want = run(microbatch=3)
    assert want[-1] == []
    tried = little_memory(monkeypatch, 3)
    with pytest.warns(RuntimeWarning, match="going on with 3"):
        got = run()
    assert got[:-1] == want[:-1] and got[-1] == ["scored 3 candidates at once, since more ran out of memory"]
    with pytest.warns(RuntimeWarning), pytest.raises(ZeroDivisionError):
        run(tmp_path / "checkpoint.pt", stop=5)
    del tried[:]
    assert run(tmp_path / "checkpoint.pt") == got and set(tried) == {3}


def test_what_cannot_be_split_says_so(model, monkeypatch):
    state = TrainState(model, optimizers_for(model, "adamw"), 0, tokens(4, 12, seed=5))
    little_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="one candidate does not fit in memory; lower the window"):
        with pytest.warns(RuntimeWarning):
            Opus.arm("calibrated", window=12).utilities(tokens(4, 12), 2, state)

    def starved(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("opus_bench.selector.capture", starved)
    with pytest.raises(torch.OutOfMemoryError, match="4 candidates do not fit in memory, and the exact Gram"):
        Opus.arm("calibrated", window=12, redundancy="paper").utilities(tokens(4, 12), 2, state)
    monkeypatch.setattr("opus_bench.selector.mean_gradient", starved)
    with pytest.raises(torch.OutOfMemoryError, match="the proxy batch of 4 does not fit in memory"):
        Opus.arm("calibrated", window=12).utilities(tokens(4, 12), 2, state)


def test_an_error_that_is_not_of_memory_is_not_retried(model, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(streamed, "stream", broken)
    state = TrainState(model, optimizers_for(model, "adamw"), 0, tokens(4, 12, seed=5))
    with pytest.raises(RuntimeError, match="shapes differ"):
        Opus.arm("calibrated", window=12).utilities(tokens(4, 12), 2, state)


def score_in_little_memory(path: Path) -> None:
    """Utilities of many candidates as they are, and in an address space that is nearly full."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from opus_bench.model import OpusGPT2, OpusGPT2Config

    model = OpusGPT2(OpusGPT2Config(2000, 1, 16, 2, 64))
    batch = torch.randint(2000, (256, 64))
    state = TrainState(model, optimizers_for(model, "adamw", steps=1), 0, batch[:2])
    want = Opus.arm("calibrated", window=64, microbatch=8).utilities(batch, 8, state).alignment
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))  # the logits take 131 MB
    opus = Opus.arm("calibrated", window=64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = opus.utilities(batch, 8, state).alignment
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    path.write_text(json.dumps([len(told), opus._fitting, torch.allclose(got, want, rtol=1e-4, atol=1e-6)]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address spaces are measured on Linux")
def test_memory_that_really_runs_out(tmp_path, record_property):
    process = CONTEXT.Process(target=score_in_little_memory, args=(tmp_path / "said",))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    told, fitting, close = json.loads((tmp_path / "said").read_text())
    assert told >= 1 and fitting == 256 >> told
    note(record_property, 1, int(close))


# The package index -------------------------------------------------------------------------------


class Index(http.server.BaseHTTPRequestHandler):
    """A package index of a folder that may break off in the middle of a file, or be gone."""

    folder: Path
    broken: str  # a file that comes half, or "everything"
    served: list[str]

    def do_GET(self):
        *_, name = self.path.rstrip("/").split("/")
        path = self.folder / name
        if self.broken == "everything":
            self.send_error(503)
        elif path.is_file():
            self.served.append(name)
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name == self.broken else content)
        else:
            links = "".join(f'<a href="/files/{p.name}">{p.name}</a>' for p in self.folder.iterdir())
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(links.encode())

    def log_message(self, *arguments):
        pass


def test_an_index_out_of_reach_midway(cache, corpus, tmp_path, monkeypatch, record_property):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for key in SPEC.sources:
        shutil.copy(cache / "archives" / ARCHIVES[key].filename, shelf)
    handler = type("Broken", (Index,), {"folder": shelf, "broken": ARCHIVES["recipes"].filename, "served": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
    try:
        for broken in (ARCHIVES["recipes"].filename, "everything"):
            handler.broken = broken
            with pytest.raises(CorpusError, match=rf"cannot fetch {ARCHIVES['recipes'].pin} .*connect to a package"):
                build_corpus(SPEC, tmp_path / "cache", progress=False)
            assert sorted(p.name for p in (tmp_path / "cache" / "archives").iterdir() if p.suffix != ".lock") == [
                ARCHIVES["wiki"].filename]
            assert {p.suffix for p in (tmp_path / "cache").glob("corpora/*")} == {".lock"}
        handler.broken = ""
        again = build_corpus(SPEC, tmp_path / "cache", progress=False)
    finally:
        server.shutdown()
        server.server_close()
    assert handler.served.count(ARCHIVES["wiki"].filename) == 1  # what was whole is not fetched again
    note(record_property, 2, 2 * (again.manifest == corpus.manifest))


# Surroundings ------------------------------------------------------------------------------------


def turkish(folder: Path) -> dict[str, str] | None:
    """Environment in which a locale with decimal commas can be set, or None where none can be made."""
    listed = shutil.which("locale") and subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout
    if listed and "tr_TR.utf8" in listed.split():
        return {}
    made = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")], capture_output=True).returncode
    return {"LOCPATH": str(folder)} if made == 0 else None


SURROUNDINGS = {
    "no locale, ASCII, clock in 1975": (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "AAA+12", "PYTHONHASHSEED": "1"},
        -50 * 365 * 24 * HOUR, ()),
    "decimal commas, clock a century ahead": (
        {"LC_ALL": "tr_TR.UTF-8", "TZ": "BBB-14", "PYTHONHASHSEED": "2"}, 100 * 365 * 24 * HOUR, ("tr_TR.UTF-8",)),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_no_number(cache, whole, tmp_path, record_property, name):
    environment, clock, language = SURROUNDINGS[name]
    if language:
        more = turkish(tmp_path)
        if more is None:
            pytest.skip("no locale with decimal commas is installed or can be made")
        environment = environment | more
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fault_runs.py", cache, tmp_path / "results", str(clock), *language],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = load(tmp_path / "results" / "runs")
    year = int(record["written_utc"][:4])
    assert abs(year - time.gmtime().tm_year) >= 49
    assert all(record["timing"][key] >= 0 for key in ("train_s", "select_s", "eval_s"))
    note(record_property, 1, outcome(record) == whole["adamw"][0])


def test_two_grids_in_one_folder_at_once(cache, whole, tmp_path, record_property):
    grids = [CONTEXT.Process(target=grid, args=(cache, tmp_path / "results")) for _ in range(2)]
    for one in grids:
        one.start()
    for one in grids:
        one.join(120)
    assert [one.exitcode for one in grids] == [0, 0]
    records = load(tmp_path / "results" / "runs")
    assert len(records) == 2 and not list((tmp_path / "results").rglob("*.tmp"))
    alike = [outcome(r) == whole[r["config"]["optimizer"]][0] for r in records]
    note(record_property, 2, sum(alike))
    left = tmp_path / "results" / "work" / records[0]["run_id"] / "checkpoint.pt"  # of a kill just after the record
    left.write_text("left")
    again = CONTEXT.Process(target=grid, args=(cache, tmp_path / "results"))
    again.start()
    again.join(120)
    assert again.exitcode == 0 and not left.exists()


def test_a_readme_is_not_lost_when_writing_its_results_breaks_off(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(f"a\n{MARKERS[0]}\nold\n{MARKERS[1]}\nb\n")
    before = path.read_bytes()

    def broken(self, text, **options):
        self.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", broken)
        with pytest.raises(OSError, match="No space left"):
            update_readme(path, MARKERS, "new")
    assert path.read_bytes() == before
    update_readme(path, MARKERS, "new")
    assert path.read_text() == f"a\n{MARKERS[0]}\nnew\n{MARKERS[1]}\nb\n" and list(tmp_path.iterdir()) == [path]


def test_the_page_of_faults_is_that_of_its_counts():
    counts = json.loads((faults.DOCS / "faults.json").read_text())
    assert (faults.DOCS / "faults.md").read_text() == faults.page(counts)
    named = {name for *_, tests in faults.FAULTS for name in tests}
    assert set(counts["tests"]) <= named
    assert all(trials == recovered > 0 for trials, recovered in counts["tests"].values())
    for name in named:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / f"test_{file}.py").read_text(), name
