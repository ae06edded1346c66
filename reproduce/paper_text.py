"""Documents of some scores out of a scored corpus of the hub, as FineWeb-Edu's: the text of a pool.

    python -m reproduce.paper_text --repository HuggingFaceFW/fineweb-edu --subset default --scores 4 5 \\
        --tokens 60e9 --out data/text/fineweb-edu-4-5

Streams the corpus in its own order, keeps documents whose column int_score is one of the scores until their column
token_count adds up to --tokens, and writes them as parquet files.  Interrupted, the same command goes on after the
last whole file; done.json says that it is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opus_bench.files import replacing

DOCUMENTS = 100_000  # of a file
COLUMNS = ("id", "text", "token_count")


def keep(rows: Any, scores: tuple[int, ...], tokens: int, out: Path, documents: int = DOCUMENTS) -> dict[str, Any]:
    """Write the documents of these scores up to so many tokens; returns what done.json holds.

    Args:
        rows: a streamed data set with COLUMNS and int_score, and ``state_dict`` and ``load_state_dict``.
        documents: of a file; an interruption loses those of the file in progress.

    Raises:
        ValueError: files of other scores or another goal in ``out``; a corpus that ends before the goal.
    """
    from tqdm import tqdm

    finished, progress = out / "done.json", out / "progress.json"
    asked = {"scores": list(scores), "tokens": tokens}
    for path in (finished, progress):
        if path.exists() and {k: v for k, v in json.loads(path.read_text()).items() if k in asked} != asked:
            raise ValueError(f"{path} is of other scores or tokens; give another --out")
    if finished.exists():
        return json.loads(finished.read_text())
    out.mkdir(parents=True, exist_ok=True)
    files, kept = 0, 0
    if progress.exists():
        saved = json.loads(progress.read_text())
        files, kept = saved["files"], saved["kept"]
        rows.load_state_dict(saved["state"])
    bar = tqdm(total=tokens, initial=kept, unit="token", unit_scale=True, desc="documents")
    chosen: list[dict[str, Any]] = []
    for row in _whole(rows):
        if row is not None and row["int_score"] in scores:
            chosen.append({name: row[name] for name in COLUMNS})
            kept += row["token_count"]
            bar.update(row["token_count"])
        if len(chosen) == documents or kept >= tokens or row is None:
            _write(chosen, out / f"{files:05d}.parquet")
            files, chosen = files + bool(chosen), []
            if kept >= tokens or row is None:
                break
            _replace(progress, {**asked, "files": files, "kept": kept, "state": rows.state_dict()})
    bar.close()
    if kept < tokens:
        raise ValueError(f"the corpus has {kept:,} tokens of score {', '.join(map(str, scores))}, {tokens:,} were "
                         "asked for; give a larger --subset or fewer --tokens")
    made = {**asked, "files": files, "kept": kept}
    _replace(finished, made)
    return made


def _whole(rows: Any) -> Iterator[dict[str, Any] | None]:
    """Every row, and None at the end."""
    yield from rows
    yield None


def _write(documents: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    if documents:
        with replacing(path) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), temporary, compression="zstd")


def _replace(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 2 after one line, 130 on ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", required=True, metavar="NAME", help="of the hub, or parquet with --files")
    parser.add_argument("--files", nargs="+", default=None, metavar="FILE", help="local files in place of the hub's")
    parser.add_argument("--subset", default="default", metavar="NAME", help="configuration (default: %(default)s)")
    parser.add_argument("--scores", type=int, nargs="+", required=True, metavar="N", help="values of int_score to keep")
    parser.add_argument("--tokens", type=float, required=True, metavar="N", help="goal, by the column token_count")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets the files and done.json")
    options = parser.parse_args(arguments)
    import datasets

    try:
        name = {"data_files": options.files} if options.files else {"name": options.subset}
        rows = datasets.load_dataset(options.repository, split="train", streaming=True, **name)
        made = keep(rows, tuple(options.scores), int(options.tokens), options.out)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{made['kept']:,} tokens in {made['files']} files of {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
