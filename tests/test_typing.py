"""The public interface is typed: mypy has nothing to say, and the shapes in its annotations are true when it runs."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPED = ("gradients", "ghost", "layers", "sequences", "sketch", "preconditioner", "optimizer_map", "utility",
          "streamed", "sampling", "selector")
HOOK = ",".join([*(f"opus_bench.{name}" for name in SHAPED), "beartype.beartype"])


def call(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment,
                          timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_mypy_accepts_the_public_interface(tmp_path):
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert {f"opus_bench/{name}.py" for name in SHAPED} | {"baselines"} <= set(files)
    code, output = call("-m", "mypy", "--cache-dir", str(tmp_path))
    assert code == 0, output


def test_what_the_core_takes_and_returns_has_the_annotated_shapes():
    """The tests of the algebra once more, every call checked against its annotations."""
    files = [f"tests/test_{name}.py" for name in ("gradients", "utility")]
    code, output = call("-m", "pytest", *files, f"--jaxtyping-packages={HOOK}", "-p", "no:cacheprovider")
    assert code == 0, output
    assert "passed" in output or "[100%]" in output


def test_a_wrong_shape_is_found():
    code, output = call("-c", f"""
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook({HOOK.split(",")[:-1]}, "beartype.beartype"):
    from opus_bench.sampling import boltzmann_probabilities
import torch
boltzmann_probabilities(torch.zeros(3), 1.0)
try:
    boltzmann_probabilities(torch.zeros(3, 3), 1.0)
except TypeCheckError:
    print("refused")
""")
    assert code == 0 and output.strip().endswith("refused"), output
