"""The README's table of the instrument reads the last stage of the newest records, and says what was not run."""

import pytest

from opus_bench.schema import RecordError
from reproduce import pages


def record(seed, *rows):
    metrics = [{"name": name, "step": step, "value": value, **keys} for name, step, value, keys in rows]
    return {"run_id": f"{seed:012d}", "metrics": metrics}


def test_the_last_stage_is_averaged_over_records():
    records = [record(0, ("lost", 5, 9.0, {"source": "a"}), ("lost", 7, 0.25, {"source": "a"}),
                      ("lost", 7, 100.0, {"source": "b"})),
               record(1, ("lost", 7, 0.5, {"source": "a", "other": 2.0}))]
    assert pages.last(records, "lost", source="a") == "0.375"
    assert pages.last(records[1:], "lost", "other", source="a") == "2"
    with pytest.raises(RecordError, match="no metric 'lost' with .*'c'"):
        pages.last(records, "lost", source="c")


def test_what_has_no_record_is_said_to_be_not_run(tmp_path):
    paths, missing = pages.write(tmp_path)
    assert [path.name for path in paths] == ["audit.md", "audit.svg",  # the one page that needs no record
                                             "instrument.md", "not_run.md", "index.html"]
    assert len(missing) == len(pages.SCRIPTS) - len(pages.WITHOUT_RECORDS)
    assert "coverage: not run: no record; `python -m reproduce.coverage` makes them" in missing
    assert "table8: not run: no record; `python -m reproduce.table8 --scale smoke` makes them" in missing
    block = pages.instrument_block(tmp_path).splitlines()
    assert len(block) == 2 + len(pages.QUESTIONS) and all("not run: `python -m" in line for line in block[2:])


def test_no_records_at_all_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pages", "--results", str(tmp_path)])
    assert pages.main() == 2
    assert "holds no records" in capsys.readouterr().err


def test_what_is_missing_is_a_page_until_it_is_there(tmp_path):
    (tmp_path / "tables").mkdir()
    (path,) = pages._not_run(tmp_path, ["table9: not run: no record"])
    assert path.read_text() == "# Not run\n\n- table9: not run: no record\n"
    assert pages._not_run(tmp_path, []) == [] and not path.exists()
