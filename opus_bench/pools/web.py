"""Sources of text at paper scale: FineWeb, FineWeb-Edu, SciencePedia, or files of your own.

A source is written on the command line as

    NAME              a source of KNOWN, from the hub
    NAME=PLACE        the same from elsewhere: a local copy, or another repository of the hub
    PLACE             text of your own; its domain is named after the file or folder

    PLACE             a .parquet, .jsonl or .json file (lines also .gz or .zst), a folder of them, or
                      hf://datasets/OWNER/NAME[@REVISION][/FOLDER]

Files are taken in the order of their names.  Those of the hub are pinned to the commit that a branch
stands for when the work begins, and streamed through `datasets`, never stored.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from opus_bench.archives import CorpusError, file_sha256
from opus_bench.errors import first_line

PARQUET, LINES = (".parquet",), (".jsonl", ".json")
PACKED = ("", ".gz", ".zst")
ROWS = 1024
"""Documents read and tokenised together."""
HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
                 r"(/(?P<folder>.+))?")


@dataclass(frozen=True)
class Known:
    """A corpus of the paper: its repository, and the buckets that make its domains."""

    repo: str | None
    """On the hub; None where no public copy is known, so that the user says where it is."""
    column: str | None = None
    """Integer column that holds a document's bucket."""
    buckets: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(ending of the domain's name, values); documents of other values are left out."""


KNOWN = {
    "fineweb": Known("HuggingFaceFW/fineweb"),
    "fineweb-edu": Known("HuggingFaceFW/fineweb-edu", "int_score", (("3", (3,)), ("4-5", (4, 5)))),
    "sciencepedia": Known(None),
}


@dataclass(frozen=True)
class Source:
    """Where documents come from and which columns hold what."""

    name: str
    place: str
    """Local path, or hf://datasets/OWNER/NAME[@REVISION][/FOLDER]."""
    text: str = "text"
    """Column of the text."""
    prompt: str | None = None
    """Column of a text before it whose tokens are no targets."""

    @property
    def _known(self) -> Known:
        return KNOWN.get(self.name, Known(None))

    @property
    def domains(self) -> tuple[str, ...]:
        """One domain, or one for each bucket."""
        return tuple(f"{self.name}-{ending}" for ending, _ in self._known.buckets) or (self.name,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns read: text, prompt, bucket, those there are."""
        return tuple(column for column in (self.text, self.prompt, self._known.column) if column is not None)

    def domain(self, row: dict[str, Any]) -> str | None:
        """The domain a row belongs to; None: left out."""
        known = self._known
        if known.column is None:
            return self.name
        return next((f"{self.name}-{end}" for end, values in known.buckets if row[known.column] in values), None)


def parse_source(text: str, subset: str, revision: str, field: str = "text", prompt: str | None = None) -> Source:
    """The source that a word of the command line names.

    Args:
        subset: of a known corpus on the hub: sample-10BT, sample-100BT, sample-350BT, default (all) or a dump
            such as CC-MAIN-2024-10.
        revision: branch, tag or commit of what comes from the hub, unless the place says @REVISION.

    Raises:
        CorpusError: for a name without a place, and for one that is no folder's name.
    """
    name, given, place = text.partition("=")
    if not given:
        name, place = (text, "") if text in KNOWN else (_name_of(text), text)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise CorpusError(f"source {text!r}: {name!r} cannot be a domain's name; give NAME={place or 'PLACE'}")
    if not place:
        repo = KNOWN[name].repo if name in KNOWN else None
        if repo is None:
            raise CorpusError(f"source {text!r} has no public copy that we know of; give {name}=FOLDER, or "
                              f"{name}=hf://datasets/OWNER/NAME")
        folder = {"default": "data"}.get(subset, subset.replace("sample-", "sample/", 1))
        place = f"hf://datasets/{repo}@{revision}/{folder if '/' in folder or folder == 'data' else 'data/' + folder}"
    elif place.startswith("hf://"):
        found = HUB.fullmatch(place)
        if found is None:
            raise CorpusError(f"source {text!r}: {place!r} is not hf://datasets/OWNER/NAME[@REVISION][/FOLDER]")
        if found["revision"] is None:
            place = f"hf://datasets/{found['repo']}@{revision}" + (f"/{found['folder']}" if found["folder"] else "")
    return Source(name, place, field, prompt)


def _name_of(place: str) -> str:
    name = place.rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"(\.(parquet|jsonl|json))?(\.(gz|zst))?$", "", name)


def list_files(source: Source, digest: bool = True) -> tuple[str | None, list[dict[str, Any]]]:
    """The commit (None for local files), and name, url, bytes and sha256 of each file in the order of names.

    Args:
        digest: False leaves the sha256 of local files out, which costs reading them (about 1 GB/s).

    Raises:
        CorpusError: if the hub cannot be reached, or there are no such files.
    """
    commit, files = (_hub_files if source.place.startswith("hf://") else _local_files)(source, digest)
    if not files:
        raise CorpusError(f"source {source.name}: no {', '.join(PARQUET + LINES)} file in {source.place}; "
                          "give another place, or another --subset")
    return commit, sorted(files, key=lambda file: file["name"])


def _local_files(source: Source, digest: bool) -> tuple[None, list[dict[str, Any]]]:
    place = Path(source.place).expanduser()
    if not place.exists():
        raise CorpusError(f"source {source.name}: {place} does not exist, and is not one of {', '.join(KNOWN)}; "
                          "give a file, a folder, or hf://datasets/OWNER/NAME")
    paths = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file() and _kind(path.name)]
    if place.is_file() and not _kind(place.name):
        raise CorpusError(f"source {source.name}: {place} is none of {', '.join(PARQUET + LINES)}; convert it")
    folder = place.parent if place.is_file() else place
    return None, [
        {"name": path.relative_to(folder).as_posix(), "url": str(path), "bytes": path.stat().st_size,
         "sha256": file_sha256(path) if digest else None}
        for path in paths
    ]


def _hub_files(source: Source, digest: bool) -> tuple[str, list[dict[str, Any]]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    from opus_bench.evaluation.paper_suite import download_problem

    place = HUB.fullmatch(source.place)
    assert place is not None
    problem = download_problem()
    if problem is not None:
        raise CorpusError(f"source {source.name}: the hub cannot be reached ({problem}); connect to it, set "
                          f"HF_ENDPOINT to a mirror, or give {source.name}=FOLDER with a copy of the files")
    try:
        commit = HfApi().dataset_info(place["repo"], revision=place["revision"]).sha
        entries = HfApi().list_repo_tree(place["repo"], place["folder"], recursive=True, revision=commit,
                                         repo_type="dataset")
        files = [entry for entry in entries if isinstance(entry, RepoFile) and _kind(entry.path)]
    except Exception as error:
        raise CorpusError(f"source {source.name}: cannot list {source.place} ({_cause(error)}); look at the name, "
                          "--subset and --revision, and whether the corpus asks for a login") from error
    return commit, [
        {"name": file.path, "url": f"hf://datasets/{place['repo']}@{commit}/{file.path}", "bytes": file.size,
         "sha256": file.lfs.sha256 if file.lfs else None}
        for file in files
    ]


def _kind(name: str) -> str | None:
    """The builder of `datasets` that reads a file of this name; None for other files."""
    if name.endswith(PARQUET):
        return "parquet"
    return "json" if name.endswith(tuple(ending + packed for ending in LINES for packed in PACKED)) else None


def read_batches(url: str, columns: Sequence[str], start: int = 0) -> Iterator[list[dict[str, Any]]]:
    """The rows of a file from row `start`, some at a time, streamed through `datasets`.

    Rows before `start` are read and dropped, which is fast beside tokenising.

    Raises:
        CorpusError: if the file is damaged, lacks a column, or its place cannot be reached (after the
            retries of `datasets`).
    """
    import datasets

    kind = _kind(url)

    def load(**options: Any) -> datasets.IterableDataset:
        return datasets.load_dataset(kind, data_files=[url], split="train", streaming=True, **options)

    try:
        rows = load()
        known = rows.column_names or next(iter(rows.take(1)), {})
        for column in columns:
            if column not in known:
                raise CorpusError(f"{url} has no column {column!r} but {', '.join(map(repr, known))}; give "
                                  "--text-field or --prompt-field")
        if kind == "parquet":
            rows = load(columns=list(columns))  # other columns are then not even downloaded
        for batch in rows.select_columns(list(columns)).skip(start).iter(ROWS):
            yield [dict(zip(columns, row, strict=True)) for row in zip(*(batch[c] for c in columns), strict=True)]
    except (CorpusError, GeneratorExit):
        raise
    except Exception as error:
        raise CorpusError(f"cannot read {url} ({_cause(error)})") from error


def count_rows(url: str, size: int) -> int | None:
    """Rows of a file without reading it: a parquet's footer, or bytes over the mean of the first lines.

    None for compressed lines, of which nothing can be said.
    """
    if _kind(url) == "parquet":
        import pyarrow.parquet

        with fsspec.open(url, "rb") as file:
            return pyarrow.parquet.read_metadata(file).num_rows
    if not url.endswith(LINES):
        return None
    with fsspec.open(url, "rb") as file:
        lines = [line for line, _ in zip(file, range(ROWS), strict=False)]
    return round(size * len(lines) / max(1, sum(map(len, lines))))


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:300]
