"""Records: what is malformed is refused by name, what is written is whole, and identity follows the code only."""
import copy
import json
import math
import os
import re
from pathlib import Path

import pytest

from opus_bench import hashing, provenance, results, schema
from opus_bench.schema import RecordError

SHA = "ab" * 32


def record_of(seed=0, method="Random", **changes):
    """A smallest valid record; `changes` replace top-level keys before run_id is computed."""
    record = {
        "schema": 1,
        "run_id": "",
        "experiment": "table3",
        "scale": "smoke",
        "arm": None,
        "method": method,
        "paper": {"arxiv": schema.ARXIV, "item": "Table 3", "row": method},
        "config": {"selector": "random", "optimizer": "adamw", "seed": seed, "lr": 0.001, "betas": [0.8, 0.95]},
        "deviations": ["4 layers instead of 48"],
        "data": {
            "spec_sha256": SHA,
            "train_sha256": SHA,
            "proxy_sha256": None,
            "tokenizer_sha256": SHA,
            "suite_sha256": SHA,
            "selected_sha256": SHA,
            "target_domain": "encyclopedia",
        },
        "code": {"version": SHA, "commit": None, "dirty": None},
        "environment": provenance.environment() | {"torch": "2.13.0", "numpy": "2.4.6"},
        "timing": {"wall_s": 12.5, "train_s": 10.0, "select_s": 0.0, "eval_s": 2.0, "peak_bytes": 10**8},
        "metrics": [
            {"step": 0, "tokens_seen": 0, "split": "val/news", "name": "loss", "unit": "nat/token", "value": 8.0}
        ],
        "evals": [
            {
                "task": "cloze",
                "task_version": 1.0,
                "metric": "acc",
                "higher_is_better": True,
                "n_shot": 0,
                "n_samples": 500,
                "limit": None,
                "batch_size": 8,
                "value": 0.3,
                "stderr": 0.02,
                "chance": 0.25,
                "surface": 0.28,
                "surface_name": "unigram",
            },
            {"task": "hellaswag", "status": "not run: no hub", "value": None},
        ],
        "selection": {
            "offered": {"encyclopedia": 40, "spam": 24},
            "chosen": {"encyclopedia": 20, "spam": 12},
            "per_step": {
                "step": [0, 1],
                "effective_sample_size": [1.0, None],
                "total_variation": [0.0, None],
                "utility_std": [None, None],
            },
            "notes": [],
        },
        "final": {"weights_sha256": SHA},
    }
    record.update(changes)
    record["run_id"] = schema.run_id(
        record["experiment"], record["config"], record["data"]["spec_sha256"], record["code"]["version"]
    )
    return record


def changed(path, value, record=None):
    """The record with the item at path ("data.train_sha256", "metrics.0.value") set, or removed by `del`."""
    record = copy.deepcopy(record or record_of())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    block = record
    for key in parents:
        block = block[key]
    if value is del_:
        del block[last]
    else:
        block[last] = value
    return record


del_ = object()


def test_a_valid_record_is_accepted():
    schema.validate(record_of())


@pytest.mark.parametrize("key", [*schema.FIELDS])
def test_every_top_level_key_is_required(key):
    with pytest.raises(RecordError, match=f"{key} is missing"):
        schema.validate(changed(key, del_))


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("schema", 2, "schema must be 1, got 2"),
        ("schema", True, "schema must be 1"),
        ("arm", "best", "arm must be one of paper, released, calibrated or null, got 'best'"),
        ("method", "", "method must be a string"),
        ("config.seed", -1, "config.seed must be an integer of at least 0, got -1"),
        ("config.seed", True, "config.seed"),
        ("config.lr", math.nan, "config.lr must be finite, got nan"),
        ("config.lr", {1}, "config.lr must be a JSON value"),
        ("config.optimizer", del_, "config.optimizer is missing"),
        ("deviations", "none", "deviations must be a list of strings"),
        ("data.spec_sha256", "xyz", "data.spec_sha256 must be lower-case hexadecimal, got 'xyz'"),
        ("data.proxy_sha256", del_, "data.proxy_sha256 is missing"),
        ("code.dirty", "no", "code.dirty must be true, false or null"),
        ("environment.threads", "2", "environment.threads"),
        ("timing.wall_s", -1.0, "timing.wall_s must be seconds, at least 0, got -1.0"),
        ("timing.train_s", math.inf, "timing.train_s must be finite, got inf"),
        ("timing.peak_bytes", 1.5, "timing.peak_bytes"),
        ("metrics.0.value", math.nan, r"metrics\[0\].value must be finite, got nan"),
        ("metrics.0.value", "8", r"metrics\[0\].value must be a finite number, got '8'"),
        ("metrics.0.unit", del_, r"metrics\[0\].unit is missing"),
        ("metrics.0", 3, r"metrics\[0\] must be an object, got 3"),
        ("evals.0.higher_is_better", 1, r"evals\[0\].higher_is_better must be true or false"),
        ("evals.0.value", None, r"evals\[0\].value must be a finite number, got None"),
        ("evals.0.chance", "1/4", r"evals\[0\].chance"),
        ("evals.1.status", "skipped", r"evals\[1\].task_version is missing"),
        ("evals.1.value", 0.3, r"evals\[1\].value must be null for a task that was not run"),
        ("selection.chosen.poetry", 3, "selection.chosen.poetry must be a domain of selection.offered"),
        ("selection.offered.spam", 1.5, "selection.offered"),
        ("selection.per_step.utility_std", [1.0], "selection.per_step.utility_std must be 2 long"),
        ("selection.per_step.total_variation", del_, "selection.per_step.total_variation is missing"),
        ("selection.per_step.effective_sample_size.0", 32.0, r"effective_sample_size must be a share .* got 32.0"),
        ("selection.per_step.effective_sample_size.0", 0.0, "effective_sample_size must be a share"),
        ("selection.per_step.total_variation.0", 1.5, r"total_variation must be in \[0, 1\]"),
        ("run_id", "0123456789ab", "run_id 0123456789ab is not the hash of its inputs"),
        ("colour", "red", "unknown key 'colour'"),
    ],
)
def test_errors_name_the_file_the_key_and_the_value(path, value, message):
    with pytest.raises(RecordError, match=rf"^somewhere\.json: .*{message}"):
        schema.validate(changed(path, value), "somewhere.json")


def test_run_id_is_pinned_and_follows_every_input():
    config = {"seed": 0, "lr": 1e-3}
    first = schema.run_id("table3", config, SHA, SHA)
    assert first == "325769480338"
    assert first == schema.run_id("table3", {"lr": 1e-3, "seed": 0}, SHA, SHA)
    others = [("table4", config, SHA, SHA), ("table3", {"seed": 1, "lr": 1e-3}, SHA, SHA)]
    others += [("table3", config, "00" * 32, SHA), ("table3", config, SHA, "00" * 32)]
    assert len({first, *(schema.run_id(*other) for other in others)}) == 5


def test_what_is_written_is_read_back(tmp_path):
    record = record_of()
    before = copy.deepcopy(record)
    path = results.write(record, tmp_path / "runs")
    assert path == tmp_path / "runs" / f"{record['run_id']}.json"
    assert record == before
    got = results.read(path)
    assert {key: got[key] for key in schema.FIELDS} == record
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_writing_twice_changes_nothing_and_never_overwrites(tmp_path):
    record = record_of()
    path = results.write(record, tmp_path)
    before = path.read_bytes()
    results.write(record, tmp_path)
    assert path.read_bytes() == before
    with pytest.raises(RecordError, match=f"{path.name}: holds another record of this run; delete it"):
        results.write(changed("metrics.0.value", 1.0, record), tmp_path)
    assert path.read_bytes() == before


def test_an_invalid_record_leaves_no_file(tmp_path):
    with pytest.raises(RecordError):
        results.write(changed("metrics.0.value", math.nan), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_no_record(tmp_path, monkeypatch):
    def crash(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        results.write(record_of(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_writers_cannot_overwrite_each_other(tmp_path, monkeypatch):
    first, second = record_of(), changed("timing.wall_s", 99.0)
    path = results.write(first, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(RecordError, match="holds another record"):
        results.write(second, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_record_names_file_and_mend(tmp_path, share):
    path = results.write(record_of(), tmp_path)
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(RecordError, match=f"{path.name}: truncated or not JSON .*; delete it to run again"):
        results.load(tmp_path)
    with pytest.raises(RecordError):
        results.done(tmp_path, path.stem)


def test_an_edited_record_is_refused(tmp_path):
    path = results.write(record_of(), tmp_path)
    path.write_text(path.read_text().replace('"value": 8.0', '"value": 7.0'))
    with pytest.raises(RecordError, match="does not match its record_sha256.*delete it to run again"):
        results.read(path)


def test_a_renamed_record_is_refused(tmp_path):
    path = results.write(record_of(), tmp_path)
    moved = path.rename(tmp_path / "000000000000.json")
    with pytest.raises(RecordError, match=f"rename it to {path.name}"):
        results.read(moved)


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(RecordError, match="x.json: not a finished run record"):
        results.load(tmp_path)


def test_load_filters_and_sorts(tmp_path):
    cells = [("Random", 1, "smoke"), ("OPUS", 0, "smoke"), ("Random", 0, "smoke"), ("Random", 0, "small")]
    for method, seed, scale in cells:
        data = record_of()["data"] | {"spec_sha256": SHA if scale == "smoke" else "cd" * 32}
        results.write(record_of(seed, method, scale=scale, data=data, code=code_of(method)), tmp_path)
    cells = [(record["scale"], record["method"], record["config"]["seed"]) for record in results.load(tmp_path)]
    assert cells == [("small", "Random", 0), ("smoke", "OPUS", 0), ("smoke", "Random", 0), ("smoke", "Random", 1)]
    assert len(results.load(tmp_path, scale="smoke")) == 3
    assert results.load(tmp_path, experiment="table4") == []
    assert results.load(tmp_path / "none") == []


def code_of(method):
    return {"version": hashing.text_sha256(method), "commit": None, "dirty": None}


def test_done_is_the_existence_of_the_record(tmp_path):
    record = record_of()
    assert not results.done(tmp_path, record["run_id"])
    results.write(record, tmp_path)
    assert results.done(tmp_path, record["run_id"])


def test_outcome_ignores_clock_and_machine_only():
    record = record_of()
    assert results.outcome(changed("timing.wall_s", 99.0)) == results.outcome(record)
    assert results.outcome(changed("environment.threads", 64)) == results.outcome(record)
    assert results.outcome(changed("final.weights_sha256", "cd" * 32)) != results.outcome(record)


def test_a_directory_that_cannot_be_written_is_found_before_computing(tmp_path):
    results.check_writable(tmp_path / "new" / "runs")
    assert not list((tmp_path / "new" / "runs").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file/runs: records cannot be written here"):
        results.check_writable(tmp_path / "file" / "runs")


def test_environment_and_git_state_have_the_keys_of_the_schema(tmp_path):
    assert set(provenance.environment()) == {*schema.FIELDS["environment"], "float32_products"}
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
    assert set(provenance.git_state()) == {"commit", "dirty"}


SOURCE = '''"""Module prose."""
import math  # a tail comment is part of its line


def area(radius):
    """Function prose,

    # over several lines
    """
    # A comment.
    text = """kept
# not a comment

"""
    return math.pi * radius**2, text
'''


def version_of(folder, source, name="core.py", **arguments):
    (folder / "opus_bench").mkdir(exist_ok=True)
    (folder / "opus_bench" / name).write_bytes(source.encode())
    return provenance.sources_sha256(folder, **arguments)


def test_code_version_is_pinned(tmp_path):
    assert version_of(tmp_path, SOURCE).startswith("da43ea8e")


@pytest.mark.parametrize(
    "old,new",
    [
        ("Module prose.", "Other\n\nprose."),
        ('"""Module prose."""\n', ""),
        ("Function prose,\n", "Other prose,\n\n\n"),
        ("    # A comment.\n", "\n\n"),
        ("\n\n\ndef", "\n# one\n\n   # two\ndef"),
        ("def area(radius):", "def area(radius):   "),
        ("\n", "\r\n"),
    ],
)
def test_code_version_does_not_move_with_prose(tmp_path, old, new):
    assert old in SOURCE
    assert version_of(tmp_path, SOURCE) == version_of(tmp_path, SOURCE.replace(old, new))


@pytest.mark.parametrize(
    "old,new",
    [
        ("radius**2", "radius**3"),
        ("# not a comment", "# not the comment"),
        ("comment\n\n", "comment\n"),
        ("    return", "    1\n    return"),
        ('text = """kept', 'text = f"""kept'),
        ("def area", "def areas"),
    ],
)
def test_code_version_moves_with_code(tmp_path, old, new):
    assert old in SOURCE
    assert version_of(tmp_path, SOURCE) != version_of(tmp_path, SOURCE.replace(old, new))


def test_code_version_keeps_a_docstring_that_shares_its_line_with_code(tmp_path):
    first = version_of(tmp_path, 'def f(x=1): "doc"\n')
    assert first != version_of(tmp_path, 'def f(x=2): "doc"\n')


def test_code_version_covers_core_and_baselines_but_not_the_readers_of_records(tmp_path):
    first = version_of(tmp_path, SOURCE)
    assert first == version_of(tmp_path, "x = 1\n", name="report.py")
    assert first != version_of(tmp_path, "x = 1\n", name="train.py")
    assert version_of(tmp_path, "task: a\n", name="a.yaml") != version_of(tmp_path, "task: b\n", name="a.yaml")
    second = provenance.sources_sha256(tmp_path)
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "greats.py").write_text("y = 2\n")
    assert second != provenance.sources_sha256(tmp_path)
    assert provenance.sources_sha256(tmp_path, sources=["opus_bench/core.py"]) == first


def test_validation_enters_the_code_version_of_its_own_experiments_alone(tmp_path):
    folder = tmp_path / "opus_bench" / "validation"
    folder.mkdir(parents=True)
    sources = {"one": "from .shared import x\n", "two": "import opus_bench.validation.one\n", "shared": "x = 1\n",
               "three": "from opus_bench.validation import two\n", "far": "x = 1\n"}
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    script = tmp_path / "script.py"
    script.write_text("from opus_bench.validation.two import x\n")

    def versions():
        provenance.measuring_version.cache_clear()
        files = [*(folder / f"{name}.py" for name in sources), script]
        return [provenance.sources_sha256(tmp_path), *(provenance.measuring_version(file, tmp_path) for file in files)]

    before = versions()
    assert provenance.validation_imports(script, tmp_path) == [
        f"opus_bench/validation/{name}.py" for name in ("one", "shared", "two")]
    (folder / "shared.py").write_text("x = 2  \n")
    assert [a == b for a, b in zip(before, versions())] == [True, False, False, False, False, True, False]
    (folder / "shared.py").write_text("# prose\nx = 1\n")
    assert versions() == before
    (tmp_path / "opus_bench" / "core.py").write_text("x = 1\n")
    assert not any(a == b for a, b in zip(before, versions()))


def test_every_measurement_hashes_what_it_imports_of_validation():
    folder = provenance.ROOT / "opus_bench" / "validation"
    found = provenance.validation_imports(folder / "sketch_error.py")
    names = {Path(path).stem for path in found}
    assert names == {"findings", "problem", "trained", "validate"}


def test_no_module_that_makes_numbers_imports_one_outside_the_code_version():
    folders = (provenance.SITE, provenance.VALIDATION)
    unhashed = "|".join(sorted({*provenance.UNHASHED, *folders}))
    packages = "|".join(path.parent.name for path in (provenance.ROOT / "opus_bench").glob("*/__init__.py"))
    package = rf"(opus_bench|\.+)(\.?({packages}))?"
    unwanted = (rf"^\s*from (opus_bench)?\.+(\w+\.)*({unhashed})(\.\w+)* import"
                rf"|^\s*from {package} import .*\b({unhashed})\b")
    paths = [path for folder in ("opus_bench", "baselines") for path in (provenance.ROOT / folder).rglob("*.py")]
    hashed = [path for path in paths if path.stem not in provenance.UNHASHED and path.parent.name not in folders]
    assert len(hashed) > 10
    for path in hashed:
        assert not re.search(unwanted, path.read_text(), re.MULTILINE), path
    assert re.search(unwanted, (provenance.ROOT / "opus_bench" / "report.py").read_text(), re.MULTILINE)


def test_code_version_is_that_of_this_checkout_hashed_once():
    assert provenance.code_version() == provenance.sources_sha256(provenance.ROOT)
    before = provenance.code_version.cache_info().hits
    provenance.code_version()
    assert provenance.code_version.cache_info().hits == before + 1


def test_code_version_names_the_source_it_cannot_hash(tmp_path):
    with pytest.raises(RecordError, match="gone.py: cannot hash"):
        provenance.sources_sha256(tmp_path, sources=["gone.py"])
    with pytest.raises(RecordError, match="core.py: cannot hash"):
        version_of(tmp_path, "def (:\n")
