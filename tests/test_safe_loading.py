"""Nothing that is loaded is executed or reaches out of its place: attacks, and a reading of the source.

Every attack would leave a file behind if it succeeded, and none does.
"""

import ast
import io
import pickle
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import SIZES, run

from baselines.quality import classifier_scores
from opus_bench.archives import CorpusError, members
from opus_bench.checkpoint import beside, read_whole
from opus_bench.train import RunConfig
from opus_bench.validation.own_inputs import token_array
from opus_bench.validation.own_optimizers import read_optimizer_state
from opus_bench.validation.own_settings import OwnSettings

ROOT = Path(__file__).resolve().parent.parent


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def trap(tmp_path):
    """A file that a payload makes; it must not be there at the end."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()  # the payload works
    path.unlink()
    yield path
    assert not path.exists()


# Files of tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["torch.save", "bare pickle"])
def test_a_checkpoint_with_a_payload_is_refused_and_not_executed(corpus, tmp_path, trap, content):
    config, path = RunConfig("random", **SIZES), tmp_path / "checkpoint.pt"
    if content == "torch.save":
        torch.save({"model": {}, "progress": Payload(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        read_whole(path)
    with pytest.warns(RuntimeWarning, match=r"checkpoint\.pt is damaged .*it is not used"):
        got = run(corpus, config, path)
    assert got == run(corpus, config) and beside(path, ".damaged").exists()


def test_token_ids_and_optimizer_states_with_a_payload_are_refused(model, tmp_path, trap):
    torch.save([Payload(trap)], tmp_path / "ids.pt")
    np.save(tmp_path / "ids.npy", np.array([Payload(trap)], dtype=object), allow_pickle=True)
    for name in ("ids.pt", "ids.npy"):
        with pytest.raises(ValueError, match=f"cannot read token ids of .*{name}"):
            token_array(str(tmp_path / name), "uint16")
    settings = OwnSettings(model="m", data="d", optimizer_state=str(tmp_path / "ids.pt"))
    with pytest.raises(ValueError, match="cannot read an optimizer's state of .*ids.pt"):
        read_optimizer_state(model, settings)


def test_cached_scores_with_a_payload_or_damage_are_refused(corpus, trap):
    want, _ = classifier_scores(corpus, 24)
    (path,) = corpus.directory.glob("quality-*.npz")
    good = path.read_bytes()
    np.savez(path, scores=np.array([Payload(trap)], dtype=object), seconds=1.0)
    flipped = good[:200] + bytes([good[200] ^ 255]) + good[201:]
    for content in (path.read_bytes(), good[:-30], flipped, b""):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"{path.name} is damaged .*delete it and run again"):
            classifier_scores(corpus, 24)
    path.unlink()
    assert np.array_equal(classifier_scores(corpus, 24)[0], want)


def test_a_models_own_code_and_pickled_weights_are_refused(tmp_path, trap):
    """A folder whose config asks for code of its own; and one whose weights are a pickle."""
    from opus_bench.validation.own_inputs import model_outline, read_model

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(trap)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    (folder / "config.json").write_text('{"model_type": "odd", "auto_map": {"AutoConfig": "code.C", '
                                        '"AutoModelForCausalLM": "code.M"}}')
    settings = OwnSettings(model=str(folder), data="d")
    assert settings.trust_remote_code is False
    with pytest.raises(ValueError, match="cannot read the config of"):
        model_outline(settings)
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, '
                                        '"vocab_size": 8, "n_positions": 8, "architectures": ["GPT2LMHeadModel"]}')
    torch.save({"weights": Payload(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read the weights of"):
        read_model(settings)


# Archives ----------------------------------------------------------------------------------------


def tar(path, *infos):
    with tarfile.open(path, "w:gz") as archive:
        for info, content in infos:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


OUTSIDE = ["../outside.txt", "a/../../outside.txt", "/outside.txt", "..\\outside.txt", "C:\\outside.txt",
           "C:outside.txt", "\\\\host\\share\\outside.txt"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_member_that_points_out_of_its_archive_is_refused(tmp_path, kind, name, kept):
    path = tmp_path / f"archive.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("good.txt", "good")
            archive.writestr(name, "bad")
    else:
        tar(path, (tarfile.TarInfo("good.txt"), b"good"), (tarfile.TarInfo(name), b"bad"))
    with pytest.raises(CorpusError, match="not safe to read: member .*outside.txt' points out of the archive"):
        list(members(path, lambda member: kept or member == "good.txt"))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


SPECIAL = {"symbolic link": (tarfile.SYMTYPE, "/etc/passwd"), "hard link": (tarfile.LNKTYPE, "../../etc/passwd"),
           "link inside": (tarfile.SYMTYPE, "good.txt"), "character device": (tarfile.CHRTYPE, ""),
           "block device": (tarfile.BLKTYPE, ""), "pipe": (tarfile.FIFOTYPE, "")}


@pytest.mark.parametrize("name", SPECIAL)
def test_a_member_of_a_tar_that_is_no_file_is_refused(tmp_path, name):
    path = tmp_path / "archive.tar.gz"
    tar(path, (tarfile.TarInfo("good.txt"), b"good"), (special("odd.txt", *SPECIAL[name]), b""))
    with pytest.raises(CorpusError, match="member 'odd.txt' is neither a file nor a folder"):
        list(members(path, lambda member: True))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_a_member_of_a_zip_that_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "archive.zip"
    info = zipfile.ZipInfo("odd.txt")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(CorpusError, match="member 'odd.txt' is neither a file nor a folder"):
        list(members(path, lambda member: True))


MEGABYTE = 1 << 20


def claimed(path, kind, size):
    """A tar whose header claims a size that its content may not have."""
    info = special("big", kind)
    info.size = size
    with tarfile.open(path, "w:gz") as archive:
        archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        archive.fileobj.write(bytes(MEGABYTE))


def bomb(path, kind):
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(40):
                archive.writestr(f"{number}.txt", bytes(MEGABYTE))
    elif kind == "zip that lies":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("big", bytes(40 * MEGABYTE))
        content = path.read_bytes()
        honest, lie = (40 * MEGABYTE).to_bytes(4, "little"), (10).to_bytes(4, "little")
        assert content.count(honest) == 2
        path.write_bytes(content.replace(honest, lie))
    elif kind == "tar":
        tar(path, *((tarfile.TarInfo(f"{number}.txt"), bytes(MEGABYTE)) for number in range(40)))
    elif kind == "one header":
        claimed(path, tarfile.REGTYPE, 8 << 30)
    else:
        claimed(path, {"long name": tarfile.GNUTYPE_LONGNAME, "extended header": tarfile.XHDTYPE}[kind], 7 << 30)


@pytest.mark.parametrize("kind", ["zip", "zip that lies", "tar", "one header", "long name", "extended header"])
def test_an_archive_that_unpacks_to_too_much_is_refused_before_the_memory_is_taken(tmp_path, kind):
    path = tmp_path / "archive"
    bomb(path, kind)
    assert path.stat().st_size < MEGABYTE
    tracemalloc.start()
    try:
        with pytest.raises((CorpusError, zipfile.BadZipFile), match="more than 8,388,608; delete it|Bad CRC-32"):
            list(members(path, lambda member: True, limit=8 * MEGABYTE))
        assert tracemalloc.get_traced_memory()[1] < 24 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_member_that_is_not_kept_is_not_unpacked_beyond_the_limit_either(tmp_path):
    claimed(tmp_path / "archive", tarfile.REGTYPE, 8 << 30)
    with pytest.raises(CorpusError, match="more than 8,388,608; delete it"):
        list(members(tmp_path / "archive", lambda member: False, limit=8 * MEGABYTE))


def test_an_archive_just_within_its_limit_is_read(tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", bytes(MEGABYTE))
    assert [len(content) for _, content in members(path, lambda member: True, limit=MEGABYTE)] == [MEGABYTE]
    with pytest.raises(CorpusError, match="1,048,576 bytes, more than 1,048,575"):
        list(members(path, lambda member: True, limit=MEGABYTE - 1))


# The source --------------------------------------------------------------------------------------

FOLDERS = ("opus_bench", "baselines", "reproduce", "benchmarks")
UNSAFE_MODULES = {"marshal", "shelve", "dill", "joblib", "cloudpickle"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "torch.jit.load", "torch.hub.load",
    "shutil.unpack_archive", "tempfile.mktemp"}
UNPACKING = {"extract", "extractall"}  # methods of archives
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
            "numpy.load": ("allow_pickle", False)}
FORBIDDEN = {("shell", True), ("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True),
             ("use_safetensors", False)}


def dangers(source):
    """Lines of a module that could execute what they read, each with what is wrong."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"imports {name}") for name in names if name.split(".")[0] in UNSAFE_MODULES]
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch", "yaml", "os", "numpy"):
                called = {f"{node.module}.{alias.name}" for alias in node.names}
                found += [(node.lineno, f"imports {name}") for name in called & (UNSAFE_CALLS | REQUIRED.keys())]
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in FORBIDDEN:
                found.append((node.value.lineno, f"{node.arg}={node.value.value}"))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in UNSAFE_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKING):
            found.append((node.lineno, f"calls {name}"))
        constants = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in REQUIRED and REQUIRED[name] not in constants:
            found.append((node.lineno, f"{name} without {REQUIRED[name][0]}={REQUIRED[name][1]}"))
        weights = name.startswith("AutoModel") and name.endswith(".from_pretrained")
        if weights and ("use_safetensors", True) not in constants:
            found.append((node.lineno, f"{name} without use_safetensors=True"))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_source_executes_nothing_that_it_reads(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    assert [(path.name, *danger) for path in paths for danger in dangers(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("line", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
    "np.load(path)", "np.load(path, allow_pickle=True)", "pickle.load(file)", "pickle.loads(b)", "eval(text)",
    "exec(text)", "yaml.load(file)", "yaml.load(file, yaml.FullLoader)", "f(trust_remote_code=True)",
    "subprocess.run(text, shell=True)", "os.system(text)", "archive.extractall(folder)", "archive.extract(name)",
    "from torch import load", "import joblib", "from dill import loads", "AutoModelForCausalLM.from_pretrained(name)",
    "f({}, **{}, shell=True)", "if True:\n    def g():\n        return torch.load(path)"])
def test_each_danger_is_seen(line):
    assert dangers(line)


def test_what_is_safe_is_not_taken_for_a_danger():
    assert not dangers("model.eval()\nimport pickle\ntry:\n    torch.load(p, map_location='cpu', weights_only=True)\n"
                       "except pickle.UnpicklingError:\n    pass\nyaml.safe_load(t)\nast.literal_eval(t)\n"
                       "re.compile(t)\nsubprocess.run(['git', 'status'])\n"
                       "f(trust_remote_code=settings.trust_remote_code)")


def test_code_of_a_model_is_trusted_only_where_the_user_says_so():
    """Whoever passes trust_remote_code passes on the user's flag, whose default is no."""
    flag, passed, defaults = "trust_remote_code", set(), set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == flag:
                    passed.add(ast.unparse(node.value).rpartition(".")[2])
                if isinstance(node, ast.arguments):
                    given = [None] * (len(node.args) - len(node.defaults)) + node.defaults + node.kw_defaults
                    defaults |= {default and ast.unparse(default) for one, default
                                 in zip(node.args + node.kwonlyargs, given, strict=True) if one.arg == flag}
    assert passed == {flag} and defaults <= {"False", None} and OwnSettings.trust_remote_code is False
