"""A disk that is full costs a clear line, and nothing that was there before."""

from __future__ import annotations

import http.server
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import run
from benchmarks.soak.soak import difference, tiny
from tests.small import d4rl_file
from utils.behaviour import collect
from utils.behaviour.policies import LinearPolicy, save_policy
from utils.data.download import download
from utils.errors import UserError
from utils.runs.summary import save_curve


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: its writes fail there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but TensorBoard's and the configuration, which name the process and the moment."""
    files = (path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix in (".csv", ".pt")}


def test_a_checkpoint(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before stays, the rows since are cut off, and the run goes on when there is room."""
    whole, short = tmp_path / "whole", tmp_path / "short"
    assert run.main(tiny("diffcps", "0,1", data, whole)) == 0
    assert run.main(tiny("diffcps", "0,1", data, short, "--num_epochs", "1")) == 0
    before, size = contents(short), next(short.rglob("checkpoint.pt")).stat().st_size
    capsys.readouterr()
    with files_end_at(size - 1000):
        assert run.main(tiny("diffcps", "0,1", data, short, "--resume")) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "checkpoint.pt" in line and "free some space and run again" in line
    after = contents(short)
    assert after.keys() == before.keys()
    for name, content in before.items():
        assert after[name] == content if name.endswith(".pt") else after[name].startswith(content)
    assert run.main(tiny("diffcps", "0,1", data, short, "--resume")) == 0
    assert difference(whole, short) is None


def test_a_csv_row(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows are whole up to the last that fitted."""
    command = partial(tiny, "bc", "0", data, tmp_path)
    more = ("--num_steps_per_epoch", "1", "--eval_interval", "100")
    assert run.main(command("--num_epochs", "100", *more)) == 0
    (path,) = tmp_path.rglob("metrics.csv")
    before = path.read_bytes()
    config, events = path.with_name("config.json"), next(path.parent.glob("*tfevents*"))
    assert len(before) > config.stat().st_size, (len(before), config.stat().st_size, events.stat().st_size)
    capsys.readouterr()
    with files_end_at(len(before) + 10):
        assert run.main(command("--num_epochs", "102", *more, "--resume")) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"cannot write {path}" in line
    assert path.read_bytes() == before
    assert run.main(command("--num_epochs", "102", *more, "--resume")) == 0
    assert len(path.read_bytes().splitlines()) == 103


def test_the_learning_curve(tmp_path: Path, data: str) -> None:
    assert run.main(tiny("bc", "0", data, tmp_path)) == 0
    (folder,) = tmp_path.rglob("seed_0")
    with files_end_at(2000), pytest.raises(UserError, match=r"cannot write .*curve.png: .*; the run is complete"):
        save_curve([folder], "title")


def test_a_download(tmp_path: Path) -> None:
    """What came is kept and continued; the files beside it are as they were."""
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "set.hdf5").write_bytes(content)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "other.hdf5").write_bytes(b"other")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "server"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, target = f"http://127.0.0.1:{server.server_port}/set.hdf5", tmp_path / "cache" / "set.hdf5"
    try:
        with files_end_at(100_000), pytest.raises(UserError, match="cannot write") as caught:
            download(url, target, check=lambda path: None)
        assert "\n" not in str(caught.value) and not target.exists()
        part = target.with_name("set.hdf5.part").read_bytes()
        assert len(part) <= 100_000 and content.startswith(part)
        download(url, target, check=lambda path: None)
    finally:
        server.shutdown()
        server.server_close()
    assert target.read_bytes() == content and (tmp_path / "cache" / "other.hdf5").read_bytes() == b"other"


def test_a_collection(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = LinearPolicy(np.zeros((3, 11)), np.zeros(11), np.ones(11))
    save_policy(tmp_path / "policy.npz", policy)
    arguments = ["--env", "hopper", "--policy", str(tmp_path / "policy.npz"), "--transitions", "500"]
    with files_end_at(5000), pytest.raises(UserError, match=r"cannot write .*; free some space and run again"):
        collect.main([*arguments, "--out", str(tmp_path / "set.hdf5")])
    assert [path.name for path in tmp_path.iterdir()] == ["policy.npz"]
    monkeypatch.setenv("DIFFCPS_LOCAL_DIR", str(tmp_path / "local"))
    local = tiny("bc", "0", "local", tmp_path / "runs", "--local_size", "1000")
    capsys.readouterr()
    with files_end_at(5000):
        assert run.main(local) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "cannot write" in line and not list(tmp_path.rglob("*.part"))
    assert run.main(local) == 0


def test_a_real_disk(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system of 300 kB, where the system lets one be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a file system takes root")
    except OSError:
        pytest.skip("there is no mount command")
    try:
        wide = ("--hidden_dim", "48")
        assert run.main(tiny("diffcps", "0", data, tmp_path / "whole", *wide)) == 0
        capsys.readouterr()
        code = 2
        assert run.main(tiny("diffcps", "0", data, disk, *wide)) == code
        line = capsys.readouterr().err.strip()
        assert "\n" not in line and "No space left on device" in line, line
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        assert run.main(tiny("diffcps", "0", data, disk, "--resume", *wide)) == 0
        assert difference(tmp_path / "whole", disk) is None
    finally:
        subprocess.run(["umount", str(disk)], check=False)
