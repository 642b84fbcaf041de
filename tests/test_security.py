"""Files are data: nothing in them is executed, and nothing in them says where something is written."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

import run
from benchmarks.soak.soak import tiny
from tests.report.test_report import make_run
from tests.small import d4rl_file
from utils.data import d4rl
from utils.report.__main__ import main as report

ROOT = Path(__file__).resolve().parent.parent
CODE = [ROOT / "run.py", ROOT / "hyperparameters.py"]
CODE += [path for room in ("agents", "utils", "experiments", "benchmarks") for path in (ROOT / room).rglob("*.py")]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, object], int]]:
    """(dotted name, keyword constants, line) of each call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), words, node.lineno


def faults(source: str) -> list[str]:
    """What in a source could execute what a file holds."""
    tree, found = ast.parse(source), []
    for name, words, line in calls(tree):
        if name == "torch.load" and words.get("weights_only") is not True:
            found.append(f"{line}: torch.load without weights_only=True")
        if name in ("eval", "exec", "compile", "__import__", "os.system") or words.get("shell") is True:
            found.append(f"{line}: {name}")
        if words.get("allow_pickle") is True or name.endswith((".extractall", ".unpack_archive", "yaml.load")):
            found.append(f"{line}: {name}")
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in PICKLES]
    return found


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert len(CODE) > 60
    assert {str(path.relative_to(ROOT)): found for path in CODE if (found := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "import pickle",
        "from joblib import load",
        "subprocess.run(text, shell=True)",
        "tarfile.open(path).extractall(folder)",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert len(faults(line)) == 1


def everything(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_names_in_a_dataset_never_become_paths(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = d4rl_file(tmp_path / "data" / "hostile.hdf5")
    with h5py.File(data, "a") as file:
        for name in ("env_name", "source", "label", "description"):
            file.attrs[name] = "../../outside"
        file["infos/..\\outside"] = [1.0]
        file.create_group("metadata").attrs["algorithm"] = "../outside"
        file["elsewhere"] = h5py.ExternalLink("/etc/passwd", "/")
    assert d4rl.load("hopper-medium-v2", data).size > 200
    assert run.main(tiny("bc", "0", str(data), tmp_path / "runs", "--save_best_model")) == 0
    assert not [path for path in everything(tmp_path) if "outside" in str(path)]
    assert {path.parts[0] for path in everything(tmp_path)} == {"data", "runs"}


def test_a_dataset_that_links_to_another_file_is_refused_or_harmless(tmp_path: Path) -> None:
    """HDF5 can name other files; what is read of them is numbers that are checked like any."""
    other = d4rl_file(tmp_path / "other.hdf5")
    data = d4rl_file(tmp_path / "linked.hdf5", rewards=None)
    with h5py.File(data, "a") as file:
        file["rewards"] = h5py.ExternalLink("/etc/passwd", "/rewards")
    before = other.read_bytes()
    assert run.main(tiny("bc", "0", str(data), tmp_path / "runs")) == 2
    assert other.read_bytes() == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../outside", "hopper-medium-v2/../../outside", "/outside"])
def test_a_task_that_is_a_path_is_no_task(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--env_name", name, "--dir", str(tmp_path / "runs")]) == 2
    assert "unknown task" in capsys.readouterr().err and everything(tmp_path) == set()


def test_names_in_a_runs_configuration_never_lead_out_of_an_export(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", [1.0, 2.0])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["run"] |= {"algo": "../../..", "env_name": "/outside/../.."}
    config["dataset"] = {"source": "x", "label": "../..", "rows": 9, "path": "../../outside.hdf5"}
    config["settings"]["../../outside"] = 1
    path.write_text(json.dumps(config))
    target = tmp_path / "deep" / "target"
    assert report([str(tmp_path / "runs"), "--export", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["episodes.csv.gz", "metrics.csv.gz", "runs.jsonl"]
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(tmp_path / "runs")
    assert everything(tmp_path) == {Path("deep")}
