"""Where a record's numbers come from: the code, the checkout and the machine.

    code_version()    the hash that enters run_id: edits of prose and of readers leave it as it is
    measuring_version()  the same of a validation experiment: the core, its own file and what that imports
    git_state()       the commit, for people; it identifies nothing
    environment()     versions and machine
"""
from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from opus_bench.hashing import text_sha256
from opus_bench.schema import RecordError

ROOT = Path(__file__).resolve().parent.parent
UNHASHED = frozenset(
    {"schema", "provenance", "results", "statistics", "significance", "sections", "tables", "figures", "report"}
    | {"cli", "doctor", "command", "records", "samples", "score"}
)
"""Modules that make no number of a record: they check, store and read records, or print beside them."""
SITE = "site"
"""The folder whose modules make none either."""

VALIDATION = "validation"
"""The folder whose modules make the numbers of validation experiments, and none of a training run."""

@functools.lru_cache
def code_version() -> str:
    """`sources_sha256` of this checkout, hashed once per process."""
    return sources_sha256(ROOT)


@functools.lru_cache
def measuring_version(source: Path, root: Path = ROOT) -> str:
    """Version of the code that makes the numbers of a validation experiment.

    It is that of the core, of the experiment's ``source`` and of the modules of VALIDATION that the source
    imports, directly or by way of one another; other experiments may change without moving it.
    """
    of_source = sources_sha256(source.parent, [source.name])
    inside = sources_sha256(root, validation_imports(source, root))
    return text_sha256(f"{sources_sha256(root)} {of_source} {inside}")


def validation_imports(source: Path, root: Path = ROOT) -> list[str]:
    """Modules of VALIDATION that a source imports, with what those import of it: sorted paths below root.

    Raises:
        RecordError: a source that is missing or is not Python.
    """
    folder = root / "opus_bench" / VALIDATION
    found: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise RecordError(f"{path}: cannot hash this source ({error})") from error
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                near = node.level == 1 and path.parent == folder
                start = f"opus_bench.{VALIDATION}." * near + (node.module or "")
                names = [start, *(f"{start.rstrip('.')}.{alias.name}" for alias in node.names)]
            for name in names:
                head, _, module = name.rpartition(".")
                imported = folder / f"{module}.py"
                if head == f"opus_bench.{VALIDATION}" and imported.exists() and imported not in found:
                    found.add(imported)
                    left.append(imported)
    return sorted(path.relative_to(root).as_posix() for path in found)


def sources_sha256(root: str | Path, sources: Iterable[str] | None = None) -> str:
    """sha256 of the code that determines numbers, unmoved by edits of prose.

    Blank lines, full-line comments, docstrings and trailing blanks do not count; a comment at the
    end of a code line does, and task files (.yaml) count as they stand. Lines are dropped from the
    text (by the line numbers of `ast`), the tree itself is not hashed, so the same files give the
    same version under every Python.

    Args:
        root: folder that holds `opus_bench/` and `baselines/`.
        sources: the files to hash, relative to root; by default every module and task file of
            `opus_bench` but those in UNHASHED and in the folders SITE and VALIDATION, and all of `baselines`.

    Raises:
        RecordError: a source that is missing or is not Python.
    """
    root = Path(root)
    if sources is None:
        patterns = ("opus_bench/**/*.py", "opus_bench/**/*.yaml", "baselines/**/*.py")
        found = [path for pattern in patterns for path in root.glob(pattern)]
        paths = [path for path in found
                 if path.stem not in UNHASHED and path.parent.name not in (SITE, VALIDATION)]
    else:
        paths = [root / source for source in sources]
    digest = hashlib.sha256()
    for name, path in sorted({path.relative_to(root).as_posix(): path for path in paths}.items()):
        try:
            text = path.read_text(encoding="utf-8")
            code = _without_prose(text) if path.suffix == ".py" else text
        except (OSError, SyntaxError, ValueError) as error:
            raise RecordError(f"{path}: cannot hash this source ({error})") from error
        digest.update(f"{name}\0{code}\0".encode())
    return digest.hexdigest()


def _without_prose(source: str) -> str:
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    lines = source.split("\n")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings, text = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and node.body and _is_string(node.body[0]):
            string = node.body[0].value
            before = lines[string.lineno - 1].encode()[: string.col_offset].strip()
            after = lines[string.end_lineno - 1].encode()[string.end_col_offset :].strip()
            if not before and (not after or after.startswith(b"#")):
                docstrings.update(range(string.lineno, string.end_lineno + 1))
        is_text = isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        )
        if is_text and node.end_lineno > node.lineno:
            text.update(range(node.lineno, node.end_lineno + 1))
    kept = []
    for number, line in enumerate(lines, start=1):
        if number in docstrings:
            continue
        if number in text:
            kept.append(line)
        elif line.strip() and not line.lstrip().startswith("#"):
            kept.append(line.rstrip())
    return "\n".join(kept)


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def git_state(root: str | Path = ROOT, sources: Iterable[str] = ("opus_bench", "baselines", "reproduce")) -> dict:
    """{commit, dirty} of the checkout; dirty looks at the sources only; both None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", *(source for source in sources if (Path(root) / source).exists()))
    return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": None if status is None else bool(status)}


def environment(device: str = "cpu") -> dict:
    """Versions and machine that a record states: no user, no host name, no kernel build.

    ``float32_products`` is torch's setting: "highest" is float32, "high" lets a GPU round factors to TF32.
    """

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    if torch and str(device).startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__ if torch else version("torch"),
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
        "numpy": version("numpy"),
        "platform": "-".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "cpu": _cpu_model(),
        "device": str(device),
        "threads": threads,
        "float32_products": torch.get_float32_matmul_precision() if torch else "highest",
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
