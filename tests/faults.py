"""Which faults a run survives, counted by running the tests that put them upon it.

    python -m tests.faults            # runs them, about six minutes; writes docs/faults.json and docs/faults.md
    python -m tests.faults --offline  # without the tests that need a package index, whose rows then say so
    python -m tests.faults --page     # docs/faults.md again from docs/faults.json, without running anything

A trial is one fault put upon one run; a test that makes several says how many, any other makes one.  Exit code 1 if
a trial did not end as it should.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from opus_bench import provenance
from opus_bench.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RECOVERED = "the same command ends with the same record"

# (fault, what is done about it, tests as file::name)
FAULTS = [
    ("kill -9 at moments spread over a run", f"{RECOVERED}, from the last checkpoint", [
        "faults::test_killed_at_moments_spread_over_the_run"]),
    ("kill -9 just before a file is opened, named or deleted", f"{RECOVERED}; nothing half-written is left", [
        "faults::test_killed_just_before_a_file_is_opened_named_or_deleted"]),
    ("ended by the kernel in the middle of writing checkpoint or record", f"{RECOVERED}; half is never read as done", [
        "faults::test_ended_in_the_middle_of_a_write"]),
    ("kill -9 of a grid, or of its parent alone", RECOVERED, [
        "reproduce::test_killed_at_a_random_moment_and_started_again_gives_the_same_records"]),
    ("stopped after any step, for every selector, AdamW and Muon", "the resumed run is the uninterrupted one", [
        "train::test_a_run_stopped_anywhere_and_resumed_is_the_uninterrupted_run"]),
    ("no room for a checkpoint or the record: file size limit, full device", f"one error names the file; {RECOVERED}", [
        "faults::test_no_room_for_a_file",
        "faults::test_a_device_that_is_full"]),
    ("checkpoint cut short, blanked or with altered bytes", "a warning names it, the one before is used; same end", [
        "faults::test_a_damaged_checkpoint_gives_way_to_the_one_before"]),
    ("both checkpoints damaged", "two warnings, the run starts anew; same end", [
        "faults::test_with_every_checkpoint_damaged_the_run_starts_anew"]),
    ("one byte of a checkpoint flipped", "refused by name, or what is read is what was written", [
        "faults::test_a_flipped_byte_is_found_or_changes_nothing"]),
    ("checkpoint of another run", "refused by name and left alone", [
        "faults::test_a_checkpoint_of_another_run_is_refused_and_left_alone"]),
    ("record truncated, edited or renamed", "refused by name; never read as done", [
        "results::test_a_truncated_record_names_file_and_mend",
        "results::test_an_edited_record_is_refused",
        "results::test_a_renamed_record_is_refused",
        "reproduce::test_a_corrupted_record_is_refused_and_left_alone"]),
    ("archive, token shard or cached score damaged on disk", "refused by name", [
        "archives::test_a_damaged_file_in_the_cache_is_named",
        "reproduce::test_a_corrupted_token_shard_is_refused_by_name",
        "safe_loading::test_cached_scores_with_a_payload_or_damage_are_refused"]),
    ("package index breaks off in the middle of a file, or is gone", "one error names the package; what came whole is "
     "kept, and the same command ends with the same corpus", ["faults::test_an_index_out_of_reach_midway"]),
    ("download fails, comes wrong, or finds the disk full", "tried once more, or one error; nothing half is kept", [
        "archives::test_a_failed_download_is_tried_once_more",
        "archives::test_a_package_out_of_reach_is_named_with_the_mend",
        "archives::test_a_file_with_another_digest_is_not_kept",
        "archives::test_a_full_disk_is_not_taken_for_a_broken_network"]),
    ("no hub for the paper's tasks", "rows say not run, with the reason", [
        "evaluate::test_the_papers_tasks_are_not_run_without_a_hub",
        "evaluate::test_the_hub_is_found_missing_quickly"]),
    ("out of memory in scoring, raised by the estimator", "microbatch halved, the same choice; diagnostics and the "
     "record say so", ["faults::test_out_of_memory_halves_the_microbatch"]),
    ("out of memory in scoring, address space really full", "microbatch halved, the same utilities to rounding", [
        "faults::test_memory_that_really_runs_out"]),
    ("out of memory where candidates cannot be split", "one error says why and what to change", [
        "faults::test_what_cannot_be_split_says_so"]),
    ("NaN loss or NaN gradient in an update", f"one error names the step; no record; mended, {RECOVERED}", [
        "faults::test_a_number_that_is_none_ends_the_run_with_its_step"]),
    ("other locale, encoding, time zone, hash seed; clock decades off and running back", "the same record", [
        "faults::test_surroundings_change_no_number"]),
    ("two grids in one folder at once", "both end well, each run is made once, no record is lost", [
        "faults::test_two_grids_in_one_folder_at_once"]),
    ("two processes train one model: kill -9 of one or of both, at moments spread over the run and just before a file "
     "is opened, named or deleted", f"the others end, by themselves or by the launcher's SIGTERM; {RECOVERED}", [
         "shared_faults::test_killed_at_moments_spread_over_the_run",
         "shared_faults::test_killed_just_before_a_file_is_opened_named_or_deleted"]),
    ("two processes under torchrun itself: kill -9 of one, three times in one run",
     f"torchrun ends the other and fails; {RECOVERED}", ["shared_faults::test_killed_three_times_under_torchrun"]),
    ("two processes: one ended by the kernel in the middle of writing its shard", f"{RECOVERED}; half is never read", [
        "shared_faults::test_ended_in_the_middle_of_writing_a_shard"]),
    ("two processes: no room for one's shard, or for the last file of a checkpoint",
     f"the same error on both, which names the checkpoint that stays in force; {RECOVERED}", [
         "shared_faults::test_no_room_for_a_shard_of_one_process",
         "shared_faults::test_no_room_for_the_last_file_of_a_checkpoint"]),
    ("checkpoint of two processes with a file cut or altered", "a warning names it, the one before is used; same end", [
        "shared_faults::test_a_damaged_checkpoint_gives_way_to_the_one_before"]),
    ("checkpoint of two processes with a file cut, altered or lost, as one process finds it",
     "a warning names it, the one before is in force", [
         "pretrain::test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_in_force"]),
    ("two processes: NaN gradient on one alone", f"one error on each names the step; mended, {RECOVERED}", [
        "shared_faults::test_a_gradient_that_is_nan_on_one_process_is_one_error"]),
    ("two processes killed, the same command given to one", "it goes on; the same choices, losses to rounding", [
        "shared_faults::test_a_run_of_two_killed_processes_goes_on_in_one"]),
    ("two processes: the same command given twice at once in one folder", "both end well, with one record", [
        "shared_faults::test_the_same_run_started_twice_at_once_in_one_folder"]),
    ("two processes write one record", "the first is kept, another one is refused", [
        "results::test_two_writers_cannot_overwrite_each_other"]),
    ("checkpoint, token ids, optimizer state or scores that carry a pickle's payload", "refused; not executed", [
        "safe_loading::test_a_checkpoint_with_a_payload_is_refused_and_not_executed",
        "safe_loading::test_token_ids_and_optimizer_states_with_a_payload_are_refused"]),
    ("model folder with code of its own, or with pickled weights", "refused unless trust_remote_code is asked for; "
     "pickled weights always", ["safe_loading::test_a_models_own_code_and_pickled_weights_are_refused"]),
    ("archive member that points outside, is a link, device or pipe", "the archive is refused, nothing is written", [
        "safe_loading::test_a_member_that_points_out_of_its_archive_is_refused",
        "safe_loading::test_a_member_of_a_tar_that_is_no_file_is_refused",
        "safe_loading::test_a_member_of_a_zip_that_is_no_file_is_refused"]),
    ("archive that unpacks to too much, or claims so", "refused before the memory is taken", [
        "safe_loading::test_an_archive_that_unpacks_to_too_much_is_refused_before_the_memory_is_taken"]),
]


class Counter:
    """A plugin of pytest that counts trials by test."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # test -> [trials, as they should be]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        path, _, name = report.nodeid.partition("[")[0].partition("::")
        said = dict(report.user_properties)
        trials = said.get("trials", 1)
        count = self.counts[f"{Path(path).stem.removeprefix('test_')}::{name}"]
        count[0] += trials
        count[1] += said.get("recovered", trials if report.passed else 0)


def count(offline: bool) -> tuple[dict, int]:
    """Run the tests of FAULTS; their counts, and pytest's exit code."""
    counter, started = Counter(), time.perf_counter()
    names = sorted({name for *_, tests in FAULTS for name in tests})
    nodes = [f"{ROOT}/tests/test_{name.replace('::', '.py::')}" for name in names]
    code = pytest.main([*nodes, "-q", "-p", "no:cacheprovider", *(["-m", "not network"] if offline else [])],
                       plugins=[counter])
    environment = provenance.environment()
    return {
        "command": "python -m tests.faults" + " --offline" * offline,
        "seconds": round(time.perf_counter() - started, 1),
        "code_version": provenance.code_version(),
        "environment": {key: environment[key] for key in ("python", "torch", "platform")},
        "tests": {name: counter.counts[name] for name in names if name in counter.counts},
    }, int(code)


def page(counts: dict) -> str:
    """docs/faults.md, a function of docs/faults.json alone."""
    rows = []
    for fault, done, tests in FAULTS:
        found = [counts["tests"][name] for name in tests if name in counts["tests"]]
        trials, good = (sum(column) for column in zip(*found)) if found else (0, 0)
        links = ", ".join(f"[{name.partition('::')[2]}](../tests/test_{name.partition('::')[0]}.py)" for name in tests)
        missing = "" if len(found) == len(tests) else f" ({len(tests) - len(found)} of {len(tests)} tests not run)"
        rows.append([fault, *([str(trials), f"{good}{missing}"] if found else ["not run", "–"]), done, links])
    environment = ", ".join(f"{key} {value}" for key, value in counts["environment"].items())
    head = (f"Made by `{counts['command']}` in {counts['seconds']:.0f} s: {environment}, code version "
            f"{counts['code_version'][:12]}. A trial is one fault put upon one run at ci scale, in one process "
            "where two are not named; each number is counted by the tests of its row. \"The same record\" is equality "
            "of losses, choices, diagnostics and the hash of the weights, bit for bit.")
    table = markdown(["fault", "trials", "ended so", "how", "tests"], rows)
    return "\n\n".join(["# Faults", head, table, NOTES])


NOTES = """## What is meant

- **Checkpoints.** Two are kept, the last and the one before, so a run needs three times its state on disk while it
  writes one. Every member's checksum is compared before a checkpoint is used, since `torch.load` alone reads altered
  weights without a word. A damaged one is set aside as `checkpoint.pt.damaged` until the run is done.
- **Several processes.** Two gloo processes on the CPU run the command of `reproduce.pretrain` under FSDP2 (Muon,
  sketched scores) and DDP (AdamW, exact scores). Every file of their checkpoint has its SHA-256 in the checkpoint's
  last file, and all are compared before it is used. A process whose group lost one ends at its next message; one that
  waits for a process that has not joined yet ends by the launcher's SIGTERM. The tests start the processes as
  torchrun does, in one row torchrun does it. All must see the same folder. All train on what process 0 chose, so
  scores whose last bits differ from GPU to GPU end no run; a process that is offered other candidates than process 0
  does, with one error that names it.
- **Out of memory.** Exact alignment, sketch and central difference are computed over again with half the microbatch,
  and the size that fitted is part of the selector's state. Utilities of two sizes differ by rounding, so such a run is
  replayed bit for bit by giving `microbatch` that size; the record's notes say which. The exact Gram, the measured
  curvature and the adjoint need all candidates at once, and the proxy batch is one batch: there the error says what to
  lower. The training step itself is not split.
- **Clock.** It is shifted inside the process; durations come from a clock that nobody sets. `written_utc` is the only
  thing in a record that a wrong clock makes wrong, and pages that choose the newest set of records believe it.
- **Loading.** `torch.load` with `weights_only=True`, `numpy.load` with `allow_pickle=False`, models from safetensors,
  archives only ever read into memory; a test reads the source for whatever else would execute what it reads
  ([test_safe_loading.py](../tests/test_safe_loading.py)). The user's flag `--trust-remote-code` is the one exception.
- **Not covered.** Loss of power (files are flushed, their folder's entry may not be), processes on several machines,
  a network that stalls without closing (others wait 30 minutes), GPUs that fail, a disk that returns wrong bytes for a
  record and its hash at once.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="leave out what needs a package index")
    parser.add_argument("--page", action="store_true", help="write the page from docs/faults.json and stop")
    options = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    code = 0
    if not options.page:
        counts, code = count(options.offline)
        (DOCS / "faults.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8", newline="\n")
    written = json.loads((DOCS / "faults.json").read_text(encoding="utf-8"))
    (DOCS / "faults.md").write_text(page(written), encoding="utf-8", newline="\n")
    print(f"wrote {DOCS / 'faults.md'}")
    return 1 if code or any(trials != good for trials, good in written["tests"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
