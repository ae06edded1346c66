"""Which items the tasks of `paper_tasks` have: loaded by lm-eval from a hub, its cache, or local files.

A file `data/NAME.SPLIT.jsonl` (or .parquet) stands in for that split of lm-eval's task NAME; prompts, options and
judging stay those of the task.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opus_bench.archives import file_sha256
from opus_bench.errors import first_line
from opus_bench.evaluation.evaluate import TEMPLATES
from opus_bench.evaluation.paper_tasks import SUITES, PaperTask

FOLDERS = ("mmlu/continuation", "anli", "hellaswag", "piqa", "siqa", "winogrande", "super_glue/wsc", "bbh/fewshot")
"""Where lm-eval keeps the stock tasks of `paper_tasks`; reading all of its folders would take long."""
READERS = {".jsonl": "json", ".parquet": "parquet"}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class CannotLoad(ValueError):
    """Why a task is not run; `status` is the short form that a table shows."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = f"not run: {status}"  # as schema.NOT_RUN, which a record is checked for


class Loader:
    """Loads the tasks of a suite, asking the hub at most once whether it answers.

    Args:
        data: a folder of local files, or None; each must be for a part of one of the tasks or SUITES.
        cache: a folder for what datasets makes of local files.
        hub_problem: why the hub cannot be asked, or None.

    Raises:
        ValueError: a folder that is none, or a file in it that belongs to no task.
    """

    def __init__(self, tasks: Sequence[PaperTask], data: str | Path | None, cache: str,
                 hub_problem: Callable[[], str | None]):
        import lm_eval.tasks

        stock = Path(lm_eval.tasks.__file__).parent
        folders = [TEMPLATES, *(stock / folder for folder in FOLDERS)]
        self.manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
        self.cache = cache
        self.files: dict[str, dict[str, Path]] = {}  # part -> split -> file
        self.hub_problem = functools.cache(hub_problem)
        if data is not None:
            self._find_files(Path(data), tasks)

    def _find_files(self, data: Path, tasks: Sequence[PaperTask]) -> None:
        if not data.is_dir():
            raise ValueError(f"{data} is not a folder; give the folder that holds NAME.SPLIT.jsonl or .parquet files")
        known = {part for task in (*tasks, *itertools.chain(*SUITES.values())) for part in self.parts(task)}
        for path in sorted(path for path in data.iterdir() if path.suffix in READERS):
            part, _, split = path.stem.rpartition(".")
            if part not in known:
                raise ValueError(f"{path.name} belongs to no task; names are NAME.SPLIT.jsonl or "
                                 f".parquet with NAME one of {', '.join(sorted(known)[:4])}, ...")
            if split in self.files.setdefault(part, {}):
                raise ValueError(f"{data} has two files for split {split} of {part}; keep one")
            self.files[part][split] = path

    def parts(self, task: PaperTask) -> list[str]:
        """lm-eval's single tasks behind a task's names, groups and tags expanded.

        Raises:
            KeyError: a name that lm-eval does not know.
        """
        found: list[str] = []

        def expand(name: Any) -> None:
            inner = name.get("task") if isinstance(name, dict) else None
            if isinstance(inner, list):
                list(map(expand, inner))
                return
            entry = self.manager.task_index.get(name)
            if entry is None:
                raise KeyError(f"lm-eval has no task, group or tag {name!r}")
            if entry.kind.name == "GROUP":
                list(map(expand, entry.cfg["task"]))
            elif entry.kind.name == "TAG":
                list(map(expand, sorted(entry.tags)))
            else:
                found.append(name)

        list(map(expand, task.lm_eval))
        return found

    def load(self, task: PaperTask) -> dict:
        """The task's parts, loaded: {"tasks": {name: task of lm-eval}, "groups": {}, "group_map": {}}.

        Raises:
            CannotLoad: with the reason.
        """
        try:
            parts = self.parts(task)
            local = [part for part in parts if part in self.files]
            if local and len(local) < len(parts):
                missing = next(part for part in parts if part not in self.files)
                raise ValueError(f"local files for {len(local)} of {len(parts)} parts; there is none for {missing}")
            if not local:
                if task.private is not None:
                    raise CannotLoad("no public copy; give --data", task.private)
                if self.hub_problem() is not None:
                    raise CannotLoad("no hub", self.hub_problem())
            specs = [self._from_files(part) if local else {"task": part} for part in parts]
            loaded = self.manager.load([{"group": f"opus {task.name}", "task": specs}])["tasks"]
            for name, part in loaded.items():
                options(name, part)
        except CannotLoad:
            raise
        except Exception as error:  # noqa: BLE001 any failure to load is the reason
            mend = "" if self.files else "; --data FOLDER takes local files in its place"
            raise CannotLoad(f"{type(error).__name__}: {first_line(error)}", f"{error}{mend}") from error
        return {"tasks": loaded, "groups": {}, "group_map": {}}

    def _from_files(self, part: str) -> dict[str, Any]:
        """The part with its data taken from local files, splits that no file is for being left out."""
        from lm_eval.tasks._yaml_loader import load_yaml

        files, config = self.files[part], load_yaml(self.manager.task_index[part].yaml_path, resolve_func=False)
        wanted = config.get("test_split") or config.get("validation_split")
        if wanted not in files:
            raise ValueError(f"{part} is evaluated on its split {wanted}; there is no {part}.{wanted}.jsonl")
        examples = config.get("fewshot_split")
        if config.get("num_fewshot") and examples not in (None, *files):
            raise ValueError(f"{part} shows {config['num_fewshot']} worked examples; there is no "
                             f"{part}.{examples}.jsonl")
        kinds = {READERS[path.suffix] for path in files.values()}
        if len(kinds) > 1:
            raise ValueError(f"the files of {part} are of several kinds; give all as .jsonl or all as .parquet")
        absent = {key: None for key in SPLITS if config.get(key) not in (None, *files)}
        data_files = {split: str(path.resolve()) for split, path in files.items()}
        return {"task": part, "dataset_path": kinds.pop(), "dataset_name": None, **absent,
                "dataset_kwargs": {"data_files": data_files, "cache_dir": self.cache}}


def split_of(part: Any) -> str:
    """The split that lm-eval evaluates a part on."""
    return part.config.test_split or part.config.validation_split


def options(name: str, part: Any, limit: int | None = None) -> int:
    """Requests that the first items of a part take: their options, or one an item where the answer is generated.

    All of its items are looked at.

    Raises:
        ValueError: no items, or an item whose label is none of its options, as where labels are hidden.
    """
    docs = list(part.eval_docs)
    if not docs:
        raise ValueError(f"{name} has no items in its split {split_of(part)}")
    if part.OUTPUT_TYPE != "multiple_choice":
        return len(docs[:limit])
    total = 0
    for index, doc in enumerate(docs):
        gold, n = gold_option(part, doc), len(part.doc_to_choice(doc))
        if not 0 <= gold < n:
            raise ValueError(f"{name}, item {index}: label {gold} is none of its {n} options; this copy hides its "
                             "labels")
        total += n if limit is None or index < limit else 0
    return total


def count_note(task: PaperTask, n: int) -> str:
    """What a cell says of the number of items, those left out by a limit counted too."""
    if task.n is None:
        return f"{n:,} items; the paper states no number"
    return f"{n:,} items as in the paper" if n == task.n else f"{n:,} items, not the paper's {task.n:,}"


def describe(name: str, part: Any, loader: Loader, correct: list[float]) -> dict:
    """The item set of a part and its share of right answers, as a row of a record has them."""
    split = split_of(part)
    files = loader.files.get(name, {})
    return {
        "lm_eval": name,
        "version": part.VERSION,
        "dataset": "local file" if files else part.config.dataset_path,
        "config": part.config.dataset_name,
        "split": split,
        "revision": None if files else revision(part.dataset[split]),
        "fingerprint": None if files else part.dataset[split]._fingerprint,
        "files_sha256": {key: file_sha256(path) for key, path in files.items()},
        "n": len(correct),
        "n_available": len(part.eval_docs),
        "value": sum(correct) / len(correct),
    }


def revision(dataset: Any) -> str | None:
    """The commit of the hub that a data set was read from, by the addresses it keeps; None where they tell none."""
    places = [*(dataset.info.download_checksums or {}), *(file["filename"] for file in dataset.cache_files)]
    found = [match[1] for place in places if (match := re.search(r"[@/]([0-9a-f]{40})(?:/|$)", place))]
    return found[0] if found else None


def gold_option(task: Any, doc: dict) -> int:
    """The index of the right option, from whichever field of the task holds it."""
    target: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return task.doc_to_choice(doc).index(target) if isinstance(target, str) else int(target)
