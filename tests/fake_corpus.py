"""Archives of invented words with the layout of the real ones, so that no test needs a network."""

import io
import json
import tarfile
import zipfile

import numpy as np

from opus_bench.archives import ARCHIVES
from opus_bench.corpus import CorpusSpec

SHARES = (("encyclopedia", 0.5), ("recipes", 0.2), ("foreign", 0.1), ("corrupted", 0.2))
SPEC = CorpusSpec(sources=("wiki", "recipes"), shares=SHARES, vocab_size=320, limit_characters=60_000)


def prose(rng, words):
    """A text of invented words."""
    stems = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu"]
    return " ".join("".join(rng.choice(stems, size=3)) for _ in range(words)).capitalize() + "."


def write_zip(path, contents):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(zipfile.ZipInfo(name), content)


def write_tar(path, contents):
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            sdist.addfile(info, io.BytesIO(content.encode()))


def write_fakes(folder):
    rng = np.random.default_rng(0)
    article = {n: {"title": f"T{n}", "extract": prose(rng, 30)} for n in range(400)}
    foreign = {n: {"title": f"F{n}", "extract": prose(rng, 30)} for n in range(200)}
    recipe = {n: {"title": f"R{n}", "ingredients": ["1 egg ()"], "steps": [prose(rng, 40)]} for n in range(200)}
    meaning = [{"text": prose(rng, 9), "examples": ["For example."]}]
    word = {n: {"entry": f"w{n}", "pos": [{"part_of_speech": "n.", "definitions": meaning}]} for n in range(9)}
    write_zip(
        folder / ARCHIVES["wiki"].filename,
        {"w/data/summaries_en-us.json": json.dumps(article), "w/data/summaries_fr-fr.json": json.dumps(foreign)},
    )
    write_zip(folder / ARCHIVES["recipes"].filename, {"r/data/recipes_en-us.json": json.dumps(recipe)})
    write_zip(folder / ARCHIVES["dictionary"].filename, {"d/data/en/words_W.json": json.dumps(word)})
    text = prose(rng, 20)
    catalogue = f'msgid ""\nmsgstr ""\n"By: Anon"\n\nmsgid "{text}"\nmsgstr "{text}"\n'
    write_tar(
        folder / ARCHIVES["django"].filename,
        {
            "Django-5.2/docs/a.txt": text,
            "Django-5.2/other/a.txt": text,
            "Django-5.2/django/a.py": text,
            "Django-5.2/tests/a.py": text,
            "Django-5.2/django/a.js": text,
            "Django-5.2/django/a.css": text,
            "Django-5.2/django/locale/xx/LC_MESSAGES/a.po": catalogue,
            "Django-5.2/django/locale/en/LC_MESSAGES/a.po": catalogue,
        },
    )
    names = ["doc/src/a.rst", "doc/src/a.md", "sympy/a.py", "sympy/tests/a.py", "a.rst"]
    write_tar(folder / ARCHIVES["sympy"].filename, {f"sympy-1.14.0/{name}": text for name in names})
