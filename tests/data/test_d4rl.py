"""D4RL's ids, scores, files and transitions: recorded facts, a plain second implementation, broken files, a server."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from utils import tasks
from utils.data import d4rl, download, rows
from utils.data.rows import Rows, qlearning_transitions, read_rows
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FACTS = json.loads((ROOT / "tests" / "fixtures" / "qlearning_facts.json").read_text())["sets"]
HOPPER = "hopper-medium-v2"


def make_arrays(rows: int, seed: int = 0, ends: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": rng.uniform(size=rows) < ends,
        "timeouts": rng.uniform(size=rows) < ends,
    }


def write(path: Path, arrays: dict[str, np.ndarray], **options) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, **options)
    return path


# --------------------------------------------------------------------------------------------------
# Ids and scores
# --------------------------------------------------------------------------------------------------
def test_ids_match_the_recorded_facts():
    path = ROOT.parent / "shared" / "reference" / "d4rl_facts.json"
    if not path.exists():
        pytest.skip("../shared/reference/d4rl_facts.json is not here")
    recorded = json.loads(path.read_text())
    recorded = {**recorded["mujoco"], **recorded["antmaze"]}
    assert set(tasks.ids()) == set(recorded) | set(ORIGINAL_STACK_ONLY)
    for env_name, facts in recorded.items():
        task = tasks.task(env_name)
        assert task.url == facts["dataset_url"], env_name
        assert (task.min_score, task.max_score) == (facts["ref_min_score"], facts["ref_max_score"]), env_name
        assert task.max_episode_steps == facts["max_episode_steps"], env_name


# Sizes and limits of Farama-Foundation/D4RL, d4rl/hand_manipulation_suite/__init__.py and d4rl/kitchen/__init__.py.
ORIGINAL_STACK_ONLY = {
    "pen-human-v1": (45, 24, 100),
    "pen-cloned-v1": (45, 24, 100),
    "kitchen-complete-v0": (60, 9, 280),
    "kitchen-partial-v0": (60, 9, 280),
    "kitchen-mixed-v0": (60, 9, 280),
}


@pytest.mark.parametrize(
    ("env_name", "facts"),
    [
        ("hopper-medium-replay-v2", ("locomotion", "hopper", "medium-replay", "v2", 1000)),
        ("antmaze-umaze-v1", ("antmaze", "umaze", "", "v1", 700)),
        ("antmaze-umaze-diverse-v0", ("antmaze", "umaze", "diverse", "v0", 700)),
        ("antmaze-eval-large-play-v0", ("antmaze", "eval-large", "play", "v0", 1000)),
        ("pen-cloned-v1", ("adroit", "pen", "cloned", "v1", 100)),
        ("kitchen-partial-v0", ("kitchen", "kitchen", "partial", "v0", 280)),
    ],
)
def test_what_an_id_says(env_name, facts):
    task = tasks.task(env_name)
    assert (task.domain, task.world, task.behaviour, task.version, task.max_episode_steps) == facts
    assert task.env_name == env_name


def test_adroits_pen_and_the_kitchen_are_known():
    for env_name, sizes in ORIGINAL_STACK_ONLY.items():
        task = tasks.task(env_name)
        assert (task.state_dim, task.action_dim, task.max_episode_steps) == sizes
    assert tasks.task("pen-human-v1").url.endswith("/offline_rl/hand_dapg_v1/pen-human-v1.hdf5")
    assert tasks.normalized_score("pen-cloned-v1", 96.262799) == 0
    assert tasks.normalized_score("kitchen-mixed-v0", 3.0) == 75


def test_ids_are_complete_and_no_two_share_a_file():
    assert len(tasks.ids()) == 18 + 24 + len(ORIGINAL_STACK_ONLY)
    assert len({task.file_name for task in tasks.TASKS.values()}) == len(tasks.ids())
    assert tasks.task("walker2d-medium-expert-v2").file_name == "walker2d_medium_expert-v2.hdf5"
    assert tasks.task("antmaze-umaze-diverse-v0").max_episode_steps == 700
    assert tasks.task("antmaze-large-play-v2").max_episode_steps == 1000


@pytest.mark.parametrize("name", FACTS)
def test_normalized_score_is_d4rls(name):
    facts = FACTS[name]
    scores = tasks.normalized_score(facts["env_name"], np.array([0.0, 1000.0, facts["mean_return"]]))
    expected = [facts["norm_0"], facts["norm_1000"], facts["mean_normalized"]]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    low, high = tasks.reference_scores(facts["env_name"])
    assert tasks.normalized_score(facts["env_name"], low) == 0
    assert tasks.normalized_score(facts["env_name"], high) == 100


def test_unknown_id_names_the_nearest_and_the_known():
    with pytest.raises(UserError, match=r"unknown task 'hoper-medium-v2'; did you mean 'hopper-medium-v2'\?") as e:
        d4rl.load("hoper-medium-v2")
    assert "antmaze-large-diverse-v2" in str(e.value) and "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# Transitions
# --------------------------------------------------------------------------------------------------
def plain_transitions(arrays: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """The row loop that d4rl describes, written out plainly."""
    result = {key: [] for key in ("states", "actions", "rewards", "next_states", "not_dones")}
    since_reset = 0
    for row in range(len(arrays["rewards"]) - 1):
        terminal = bool(arrays["terminals"][row])
        timeout = bool(arrays["timeouts"][row]) if "timeouts" in arrays else since_reset == limit - 1
        if timeout:
            since_reset = 0
            continue
        since_reset = 1 if terminal else since_reset + 1
        result["states"].append(arrays["observations"][row])
        result["actions"].append(arrays["actions"][row])
        result["rewards"].append([arrays["rewards"][row]])
        result["next_states"].append(arrays["observations"][row + 1])
        result["not_dones"].append([0.0 if terminal else 1.0])
    return {key: np.array(value, dtype=np.float32) for key, value in result.items()}


def as_rows(arrays: dict[str, np.ndarray]) -> Rows:
    return Rows(**{"timeouts": None, **arrays})


@pytest.mark.parametrize("with_timeouts", [True, False])
@pytest.mark.parametrize("ends", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("limit", [2, 7, 1000])
def test_transitions_equal_the_row_loop(with_timeouts, ends, limit):
    for seed in range(5):
        arrays = make_arrays(200, seed, ends if not with_timeouts else min(ends, 0.9))
        if not with_timeouts:
            del arrays["timeouts"]
        expected = plain_transitions(arrays, limit)
        assert len(expected["states"]) > 0
        found = qlearning_transitions(as_rows(arrays), limit)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_quirks_of_qlearning_dataset():
    arrays = make_arrays(6, ends=0.0)
    arrays["terminals"][[1, 2, 5]] = True  # 2: a timeout too; 5: the last row
    arrays["timeouts"][2] = True
    found = qlearning_transitions(as_rows(arrays), 1000)
    np.testing.assert_array_equal(found["states"], arrays["observations"][[0, 1, 3, 4]])
    np.testing.assert_array_equal(found["next_states"], arrays["observations"][[1, 2, 4, 5]])
    np.testing.assert_array_equal(found["not_dones"][:, 0], [1, 0, 1, 1])


@pytest.mark.parametrize("name", FACTS)
def test_rebuilt_sets_give_what_d4rl_made_of_them(name):
    path = DATA / f"{name}.hdf5"
    if not path.exists():
        pytest.skip("the rebuilt sets in ../shared/data are not here")
    facts = FACTS[name]
    dataset = d4rl.load(facts["env_name"], path)
    steps = np.arange(dataset.size)
    assert dataset.info["rows"] == facts["raw_transitions"]
    assert dataset.size == facts["transitions"]
    assert int((dataset.not_dones == 0).sum()) == facts["terminals"]

    def close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)

    assert dataset.info["episodes"] == facts["episodes"]
    close(dataset.info["behaviour_score"], facts["mean_normalized"])
    close(dataset.rewards.sum(dtype=np.float64), facts["reward_sum"])
    close(dataset.states.mean(0, dtype=np.float64), facts["obs_mean"])
    close(dataset.next_states.mean(0, dtype=np.float64), facts["next_obs_mean"])
    close((dataset.actions.astype(np.float64) ** 2).sum(), facts["action_sq"])
    close(steps @ dataset.states[:, 0].astype(np.float64), facts["weighted"])
    close(steps @ dataset.next_states[:, 1].astype(np.float64), facts["weighted_next"])


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"chunks": True, "compression": "lzf"}])
def test_load_reads_any_layout_and_type(tmp_path, options):
    arrays = make_arrays(50)
    arrays["observations"] = arrays["observations"].astype(np.float64)
    arrays["actions"] = arrays["actions"].astype(">f4")
    stored = {**arrays, "rewards": arrays["rewards"][:, None], "terminals": arrays["terminals"].astype(np.uint8)}
    path = write(tmp_path / "a.hdf5", {**stored, "infos/qpos": np.zeros(3)}, **options)
    dataset = d4rl.load(HOPPER, path)
    for key, value in plain_transitions(arrays, 1000).items():
        np.testing.assert_array_equal(getattr(dataset, key), value)
        assert getattr(dataset, key).dtype == np.float32
    assert dataset.env_name == HOPPER and dataset.source == str(path)
    assert dataset.info["bytes"] == path.stat().st_size
    assert dataset.info["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def without(key):
    return lambda arrays: arrays.pop(key)


def put(key, make):
    return lambda arrays: arrays.update({key: make(arrays[key])})


def spoil(key, value):
    def change(arrays):
        arrays[key] = arrays[key].astype(np.float32)
        arrays[key].flat[7] = value

    return change


BROKEN = {
    "no observations": (without("observations"), "key 'observations' is missing"),
    "no actions": (without("actions"), "key 'actions' is missing"),
    "no rewards": (without("rewards"), "key 'rewards' is missing"),
    "no terminals": (without("terminals"), "key 'terminals' is missing"),
    "NaN state": (spoil("observations", np.nan), "'observations' holds NaN"),
    "infinite action": (spoil("actions", np.inf), "'actions' holds infinity"),
    "NaN reward": (spoil("rewards", np.nan), "'rewards' holds NaN"),
    "NaN terminal": (spoil("terminals", np.nan), "'terminals' holds NaN"),
    "infinite timeout": (spoil("timeouts", np.inf), "'timeouts' holds NaN or infinity"),
    "too large for float32": (
        put("observations", lambda a: a.astype(np.float64) * 1e300),
        "'observations' holds infinity",
    ),
    "wrong state width": (put("observations", lambda a: a[:, :-1]), r"\(50, 10\), the task needs \(50, 11\)"),
    "wrong action width": (put("actions", lambda a: a[:, :2]), r"\(50, 2\), the task needs \(50, 3\)"),
    "flat states": (put("observations", lambda a: a[:, 0]), "'observations' has shape"),
    "states of images": (put("observations", lambda a: a[:, :, None]), "'observations' has shape"),
    "two rewards a row": (put("rewards", lambda a: np.stack([a, a], 1)), "'rewards' has shape"),
    "scalar rewards": (put("rewards", lambda a: a[0]), "'rewards' is empty"),
    "scalar states": (put("observations", lambda a: a[0, 0]), "'observations' has no rows"),
    "short actions": (put("actions", lambda a: a[:-1]), "'actions' has 49 rows where 'rewards' has 50"),
    "long states": (put("observations", lambda a: np.tile(a, (2, 1))), "'observations' has 100 rows"),
    "short terminals": (put("terminals", lambda a: a[:-1]), "'terminals' has 49 rows"),
    "short timeouts": (put("timeouts", lambda a: a[:-1]), "'timeouts' has 49 rows"),
    "text": (put("rewards", lambda a: np.array([b"x"] * 50)), "'rewards' is not an array of numbers"),
    "complex": (put("rewards", lambda a: a.astype(complex)), "'rewards' is not an array of numbers"),
    "compound": (put("rewards", lambda a: np.zeros(50, [("r", "f4")])), "'rewards' is not an array of numbers"),
    "nothing": (put("rewards", lambda a: h5py.Empty("f4")), "'rewards' is not an array of numbers"),
    "actions out of the box": (spoil("actions", 1.5), r"outside the action box \[-1, 1\]"),
    "no rows": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "'rewards' is empty"),
    "one row": (lambda a: a.update({k: v[:1] for k, v in a.items()}), "none of its 1 rows"),
    "timeouts only": (put("timeouts", np.ones_like), "none of its 50 rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_line(tmp_path, case):
    change, message = BROKEN[case]
    arrays = make_arrays(50)
    change(arrays)
    path = write(tmp_path / "broken.hdf5", arrays)
    with pytest.raises(UserError, match=message) as error:
        d4rl.load(HOPPER, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_group_in_place_of_an_array(tmp_path):
    path = write(tmp_path / "a.hdf5", {**make_arrays(5), "x": np.zeros(1)})
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file.create_group("rewards")
    with pytest.raises(UserError, match="'rewards' is not an array of numbers"):
        d4rl.load(HOPPER, path)


def test_another_tasks_file_is_refused(tmp_path):
    path = write(tmp_path / "a.hdf5", make_arrays(5))
    with pytest.raises(UserError, match=r"the task needs \(5, 17\)"):
        d4rl.load("walker2d-medium-v2", path)


def test_not_hdf5_not_there_and_a_folder(tmp_path):
    (tmp_path / "page.hdf5").write_text("<html>403 Forbidden</html>")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        d4rl.load(HOPPER, tmp_path / "page.hdf5")
    with pytest.raises(UserError, match="no dataset file"):
        d4rl.load(HOPPER, tmp_path / "absent.hdf5")
    with pytest.raises(UserError, match=f"no data for {HOPPER} in"):
        d4rl.load(HOPPER, tmp_path)


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}])
def test_truncated_anywhere(tmp_path, options):
    whole = write(tmp_path / "whole.hdf5", make_arrays(40), **options).read_bytes()
    part = tmp_path / "part.hdf5"
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        part.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable HDF5 file, or is truncated"):
            d4rl.load(HOPPER, part)


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}])
def test_damaged_bytes_never_raise_anything_else(tmp_path, options):
    """Some flips are harmless, the others must end in UserError; a wild length must not be believed."""
    whole = write(tmp_path / "whole.hdf5", make_arrays(40), **options).read_bytes()
    damaged, refused = tmp_path / "damaged.hdf5", 0
    tracemalloc.start()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        content = np.frombuffer(whole, dtype=np.uint8).copy()
        content[rng.integers(0, min(len(content), 3000), size=3)] = rng.integers(0, 256, size=3)
        damaged.write_bytes(content.tobytes())
        try:
            d4rl.load(HOPPER, damaged)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 20 < refused < 200
    assert peak < 64e6


def wait_for(path: Path, seconds: float = 20.0, **arguments) -> str:
    """What loading says, in a process of its own that may not hang."""
    code = "import sys; from utils.data import d4rl; d4rl.load(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, HOPPER, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds, check=False)
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["external storage", "external link", "soft link", "virtual"])
def test_numbers_outside_the_file_are_refused_before_they_are_opened(tmp_path, kind):
    """They stand outside the recorded SHA-256. The other file is a pipe: whoever opens it hangs."""
    arrays = make_arrays(50)
    rewards = arrays.pop("rewards")
    path, elsewhere = write(tmp_path / "a.hdf5", arrays), tmp_path / "elsewhere"
    os.mkfifo(elsewhere)
    with h5py.File(path, "a") as file:
        if kind == "external storage":
            file.create_dataset("rewards", shape=(50,), dtype="f4", external=[(str(elsewhere), 0, h5py.h5f.UNLIMITED)])
        elif kind == "external link":
            file["rewards"] = h5py.ExternalLink(str(elsewhere), "/rewards")
        elif kind == "soft link":
            file["other"] = rewards
            file["rewards"] = h5py.SoftLink("/other")
        else:
            layout = h5py.VirtualLayout(shape=(50,), dtype="f4")
            layout[:] = h5py.VirtualSource(str(elsewhere), "rewards", shape=(50,))
            file.create_virtual_dataset("rewards", layout)
    words = "is a link" if "link" in kind else "is stored in another file"
    assert f"'rewards' {words}" in wait_for(path)


def test_a_pipe_and_a_device_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in wait_for(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a file"):
        read_rows("/dev/zero")


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_the_recorded_hash_is_that_of_the_rows_that_were_read(tmp_path, monkeypatch, how):
    path = write(tmp_path / "a.hdf5", make_arrays(300))
    os.utime(path, ns=(0, 0))
    first, other = path.read_bytes(), write(tmp_path / "b.hdf5", make_arrays(300, seed=1))
    read = d4rl.read_rows

    def changed_after_hashing(*arguments, **options):
        path.write_bytes(other.read_bytes()) if how == "written" else os.replace(other, path)
        return read(*arguments, **options)

    monkeypatch.setattr(d4rl, "read_rows", changed_after_hashing)
    if how == "written":
        with pytest.raises(UserError, match="was written to while it was read"):
            d4rl.load(HOPPER, path)
    else:
        dataset = d4rl.load(HOPPER, path)
        assert dataset.info["sha256"] == hashlib.sha256(first).hexdigest()
        np.testing.assert_array_equal(dataset.rewards, plain_transitions(make_arrays(300), 1000)["rewards"])


@pytest.mark.parametrize("kind", ["zeros", "long block", "long stream"])
def test_a_bomb_is_refused_before_it_goes_off(tmp_path, monkeypatch, kind):
    """Files of 100 kB or so that would unpack to 100 MB or more: by size, in a block longer than the array, or by a
    stream that is longer than its block."""
    monkeypatch.setattr(rows, "_HARMLESS_BYTES", 4_000_000)
    path, arrays = tmp_path / "bomb.hdf5", make_arrays(2_000)
    if kind == "zeros":
        arrays = {key: np.zeros((2_000_000, *array.shape[1:]), array.dtype) for key, array in arrays.items()}
        write(path, arrays, compression="gzip", compression_opts=9, chunks=True)
    else:
        write(path, {key: array for key, array in arrays.items() if key != "observations"})
        with h5py.File(path, "a") as file:
            chunk = (2_000_000, 11) if kind == "long block" else (2_000, 11)
            states = file.create_dataset(
                "observations", (2_000, 11), "f4", maxshape=(None, 11), chunks=chunk, compression="gzip"
            )
            stream = zlib.compress(bytes(200_000_000), 9)
            states.id.write_direct_chunk((0, 0), stream)
    size = path.stat().st_size
    assert size < 1_500_000
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"would unpack to|packed into more bytes") as error:
        d4rl.load(HOPPER, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and peak < 4e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB: HDF5's own memory


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"shuffle": True, "fletcher32": True}])
def test_blocks_that_reach_beyond_the_array_are_read(tmp_path, options):
    path = write(tmp_path / "a.hdf5", make_arrays(50))
    with h5py.File(path, "a") as file:
        for key, array in make_arrays(50).items():
            del file[key]
            chunks = (40, *array.shape[1:])
            file.create_dataset(key, data=array, chunks=chunks, maxshape=(None, *array.shape[1:]), **options)
    assert d4rl.load(HOPPER, path).info["rows"] == 50


def test_well_packed_sets_are_read(tmp_path):
    """Constant columns pack a thousand times smaller; a set that is small all the same is no bomb."""
    arrays = {key: np.zeros_like(array) for key, array in make_arrays(50_000).items()}
    path = write(tmp_path / "a.hdf5", arrays, compression="gzip")
    assert d4rl.load(HOPPER, path).info["rows"] == 50_000


@pytest.mark.parametrize("options", [{}, {"chunks": (1 << 20, 3)}])
def test_lengths_that_only_the_header_has(tmp_path, options):
    """A file of a few kB that claims 10^12 rows is refused before any memory is set aside for them."""
    path, claimed = tmp_path / "huge.hdf5", 10**12
    with h5py.File(path, "w") as file:
        for key, width in {"rewards": None, "observations": 11, "actions": 3, "terminals": None}.items():
            shape = (claimed,) if width is None else (claimed, width)
            chunks = {"chunks": options["chunks"][: len(shape)]} if options else {}
            file.create_dataset(key, shape=shape, dtype="f4", **chunks)
    assert path.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(UserError, match="claims shape"):
        d4rl.load(HOPPER, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_compression_cannot_lie_either(tmp_path):
    """One stored chunk cannot stand for a thousand."""
    arrays = make_arrays(2000)
    path = write(tmp_path / "a.hdf5", arrays, chunks=True, compression="gzip")
    with h5py.File(path, "a") as file:
        del file["rewards"]
        rewards = file.create_dataset("rewards", shape=(2000,), dtype="f4", chunks=(2,), compression="gzip")
        rewards[:2] = 1.0
    with pytest.raises(UserError, match="'rewards' claims shape"):
        d4rl.load(HOPPER, path)


def test_load_holds_at_most_two_copies(tmp_path):
    arrays = {key: np.tile(array, (200,) + (1,) * (array.ndim - 1)) for key, array in make_arrays(1000).items()}
    path = write(tmp_path / "a.hdf5", {**arrays, "observations": arrays["observations"].astype(np.float64)})
    tracemalloc.start()
    dataset = d4rl.load(HOPPER, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(array.nbytes for array in dataset.columns.values())
    assert size > 15e6
    assert peak < 2 * size + 4e6


# --------------------------------------------------------------------------------------------------
# The cache and the server
# --------------------------------------------------------------------------------------------------
class Server:
    """A file server on this machine that can break off, ignore ranges, lie about lengths and refuse."""

    def __init__(self, content: bytes):
        self.content, self.ranges = content, []
        self.status, self.break_after, self.ignore_range, self.claim = 200, [], False, None
        self.names_versions, self.knows_if_range, self.location, self.pause = True, True, None, 0.0
        self.slow_head: threading.Event | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.ranges.append(wanted)
        if self.slow_head is not None:
            with contextlib.suppress(OSError):
                handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
                while not self.slow_head.wait(0.05):
                    handler.wfile.write(b"x")
            return
        if self.location is not None:
            handler.send_response(302)
            handler.send_header("Location", self.location)
            handler.end_headers()
            return
        if self.status != 200:
            handler.send_error(self.status)
            return
        etag = f'"{hashlib.md5(self.content).hexdigest()}"'
        if self.knows_if_range and handler.headers.get("If-Range") not in (None, etag):
            wanted = None
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and not self.ignore_range else 0
        if start and start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.end_headers()
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("Content-Length", str(self.claim or len(body)))
        if self.names_versions:
            handler.send_header("ETag", etag)
        handler.end_headers()
        if not self.pause:
            handler.wfile.write(body[: self.break_after.pop(0)] if self.break_after else body)
            return
        with contextlib.suppress(OSError):  # the client has gone
            for byte in range(len(body)):
                handler.wfile.write(body[byte : byte + 1])
                time.sleep(self.pause)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """D4RL's server with hopper-medium-v2 on it, and an empty cache."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("D4RL_DATASET_URL", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(write(tmp_path / "origin.hdf5", make_arrays(3000)).read_bytes())
    task = tasks.task(HOPPER)
    url = f"{server.url}/gym_mujoco_v2/{task.file_name}"
    monkeypatch.setitem(tasks.TASKS, HOPPER, tasks.Task(**{**vars(task), "url": url}))
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


def left_in_cache() -> list[str]:
    folder = d4rl.cache_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


FILE = "hopper_medium-v2.hdf5"


def test_cache_is_where_d4rl_keeps_it(monkeypatch, tmp_path):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert d4rl.cached_file(HOPPER) == tmp_path / ".d4rl" / "datasets" / FILE
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "else"))
    assert d4rl.cached_file(HOPPER) == tmp_path / "else" / FILE


def test_an_existing_cache_serves_and_no_server_is_asked(server):
    path = d4rl.cached_file(HOPPER)
    write(path, make_arrays(10, ends=0.0))
    dataset = d4rl.load(HOPPER)
    assert dataset.size == 9 and dataset.source == "d4rl"
    assert server.ranges == [] and left_in_cache() == [FILE]


def test_download_keeps_file_and_checksum_and_asks_once(server):
    dataset = d4rl.load(HOPPER)
    assert dataset.size == len(plain_transitions(make_arrays(3000), 1000)["states"])
    assert dataset.info["bytes"] == len(server.content)
    assert left_in_cache() == [FILE, f"{FILE}.sha256"]
    kept = (d4rl.cache_folder() / f"{FILE}.sha256").read_text()
    assert kept == f"{hashlib.sha256(server.content).hexdigest()}  {FILE}\n"
    d4rl.load(HOPPER)
    assert server.ranges == [None]


def test_a_changed_file_is_noticed(server):
    d4rl.load(HOPPER)
    write(d4rl.cached_file(HOPPER), make_arrays(10))
    with pytest.raises(UserError, match=r"not the one kept in hopper_medium-v2.hdf5.sha256"):
        d4rl.load(HOPPER)
    assert d4rl.load(HOPPER, verify=False).info["rows"] == 10


def test_a_server_whose_file_changed_is_noticed(server):
    d4rl.load(HOPPER)
    d4rl.cached_file(HOPPER).unlink()
    first = (d4rl.cache_folder() / f"{FILE}.sha256").read_text()
    server.content = write(d4rl.cache_folder() / "new.hdf5", make_arrays(100)).read_bytes()
    (d4rl.cache_folder() / "new.hdf5").unlink()
    with pytest.raises(UserError, match="not the first download's"):
        d4rl.load(HOPPER)
    assert left_in_cache() == [f"{FILE}.sha256"]
    assert (d4rl.cache_folder() / f"{FILE}.sha256").read_text() == first


def test_breaks_are_resumed_within_one_call(server):
    server.break_after = [50_000, 30_000]
    assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert server.ranges == [None, "bytes=50000-", "bytes=80000-"]


def test_a_break_is_resumed_by_a_later_call(server):
    server.break_after = [70_000] + [0] * 10
    with pytest.raises(UserError, match="70000 bytes are kept and continued next time") as error:
        d4rl.load(HOPPER)
    assert "--dataset local" in str(error.value) and "\n" not in str(error.value)
    assert left_in_cache() == [f"{FILE}.part", f"{FILE}.part.json"]
    server.break_after, server.ranges = [], []
    d4rl.load(HOPPER)
    assert server.ranges == ["bytes=70000-"]
    assert left_in_cache() == [FILE, f"{FILE}.sha256"]


def test_a_server_that_ignores_ranges(server):
    server.break_after, server.ignore_range = [60_000], True
    assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert server.ranges == [None, "bytes=60000-"]


def interrupted(server, *lengths: int) -> Path:
    """A download that broke off after so many bytes; returns the part that it left."""
    server.break_after = [*lengths] + [0] * 10
    with pytest.raises(UserError, match="are kept and continued"):
        d4rl.load(HOPPER)
    server.break_after, server.ranges = [], []
    return d4rl.cache_folder() / f"{FILE}.part"


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_pieces_of_two_versions_are_never_joined(server, tmp_path, knows_if_range):
    """Both versions are uncompressed and alike in all that HDF5 checks, so that the join would pass for a good file."""
    server.knows_if_range = knows_if_range
    interrupted(server, 70_000)
    server.content = write(tmp_path / "second.hdf5", make_arrays(3000, seed=1)).read_bytes()
    dataset = d4rl.load(HOPPER)
    assert dataset.info["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert server.ranges == ["bytes=70000-"] if knows_if_range else ["bytes=70000-", None]
    np.testing.assert_array_equal(dataset.rewards, plain_transitions(make_arrays(3000, seed=1), 1000)["rewards"])
    assert left_in_cache() == [FILE, f"{FILE}.sha256"]


def test_a_server_that_names_no_version_is_asked_for_the_whole_file_again(server):
    server.names_versions, server.break_after = False, [70_000, 80_000]
    d4rl.load(HOPPER)
    assert server.ranges == [None, None, None]


def test_a_part_of_unknown_origin_starts_anew(server):
    part = d4rl.cache_folder() / f"{FILE}.part"
    for name, content in ((part, b"x" * 1000), (part.with_name(f"{part.name}.json"), b"[1, 2")):
        name.write_bytes(content)
    assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert server.ranges == [None]


def test_a_part_that_is_too_long_or_damaged_starts_anew(server):
    part = interrupted(server, 70_000)
    part.write_bytes(b"x" * (len(server.content) + 5))
    assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert server.ranges == [None]
    d4rl.cached_file(HOPPER).unlink()
    interrupted(server, 70_000).write_bytes(b"x" * 70_000)
    d4rl.load(HOPPER)
    assert server.ranges == ["bytes=70000-", None]


def test_a_complete_part_is_only_checked(server):
    interrupted(server, 70_000).write_bytes(server.content)
    d4rl.load(HOPPER)
    assert server.ranges == [] and left_in_cache() == [FILE, f"{FILE}.sha256"]


def test_a_full_disk_leaves_no_empty_checksum(server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            d4rl.load(HOPPER)
    assert f"{FILE}.sha256" not in left_in_cache()
    d4rl.load(HOPPER)
    assert left_in_cache() == [FILE, f"{FILE}.sha256"]


def test_an_empty_checksum_is_none(server):
    """What a full disk left of earlier versions' checksums."""
    kept = d4rl.cache_folder() / f"{FILE}.sha256"
    kept.touch()
    assert d4rl.load(HOPPER).size > 0
    assert kept.read_text().startswith(hashlib.sha256(server.content).hexdigest())
    kept.write_text("")
    assert d4rl.load(HOPPER).size > 0


@pytest.mark.parametrize("length", ["9" * 5000, "\u00b2", "-5", "x"])
def test_lengths_that_are_no_numbers(server, length):
    server.claim = length
    if length.isascii() and length.isdigit():
        with pytest.raises(UserError, match="more than the bound") as error:
            d4rl.load(HOPPER)
        assert len(str(error.value)) < 2000
    else:
        assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://host:port/", "ftp://127.0.0.1/x", "file:///etc/hosts", "http://\xff"]
)
def test_a_redirect_to_a_broken_address_is_one_line(server, location):
    server.location = location
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        d4rl.load(HOPPER)
    assert "\n" not in str(error.value) and left_in_cache() == []


def test_a_server_that_dribbles_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "_PATIENCE_S", 0.3)
    server.pause = 0.05
    with pytest.raises(UserError, match=r"only \d+ bytes came in 0.3 s; \d+ bytes are kept"):
        d4rl.load(HOPPER)
    server.pause = 0.0
    assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()


def test_a_server_that_dribbles_its_answer_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "_PATIENCE_S", 0.3)
    server.slow_head = threading.Event()
    with pytest.raises(UserError, match=r"did not answer within 0\.3 s"):
        d4rl.load(HOPPER)
    server.slow_head.set()
    assert left_in_cache() == []


def test_a_server_that_gives_a_byte_per_connection_is_given_up(server):
    server.break_after = [1] * 100
    with pytest.raises(UserError, match="are kept and continued"):
        d4rl.load(HOPPER)
    assert len(server.ranges) < 10


def test_a_mirror_has_the_files_under_d4rls_names(server, monkeypatch):
    task = tasks.task(HOPPER)
    mirrored = tasks.Task(**{**vars(task), "url": "http://127.0.0.1:9/gone/" + task.file_name})
    monkeypatch.setitem(tasks.TASKS, HOPPER, mirrored)
    with pytest.raises(
        UserError,
        match=r"wget -P \S+ http://127.0.0.1:9/gone/hopper_medium-v2.hdf5.*D4RL_DATASET_URL.*D4RL_DATASET_DIR",
    ):
        d4rl.load(HOPPER)
    monkeypatch.setenv("D4RL_DATASET_URL", server.url + "/")
    assert d4rl.address(mirrored) == f"{server.url}/{FILE}"
    assert d4rl.load(HOPPER).info["sha256"] == hashlib.sha256(server.content).hexdigest()
    d4rl.cached_file(HOPPER).unlink()
    monkeypatch.setenv("D4RL_DATASET_URL", "my-mirror")
    with pytest.raises(UserError, match="must begin with http"):
        d4rl.load(HOPPER)


def test_no_folder_is_made_from_a_mistyped_variable(server, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cahce"))
    with pytest.raises(UserError, match=r"D4RL_DATASET_DIR names a folder that is not there.*mkdir -p"):
        d4rl.load(HOPPER)
    assert not (tmp_path / "cahce").exists() and server.ranges == []


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_says_where_and_what_to_do(server, status):
    server.status = status
    with pytest.raises(UserError, match=f"HTTP {status}") as error:
        d4rl.load(HOPPER)
    text = str(error.value)
    assert str(d4rl.cached_file(HOPPER)) in text and tasks.task(HOPPER).url in text
    assert "--dataset PATH" in text and "--dataset local" in text and "\n" not in text
    assert left_in_cache() == []


def test_no_network(server):
    server.httpd.shutdown()
    server.httpd.server_close()
    with pytest.raises(UserError, match=r"no file .*hopper_medium-v2.hdf5, and it cannot be downloaded"):
        d4rl.load(HOPPER)
    assert left_in_cache() == []


@pytest.mark.parametrize("content", [b"<html>sign in to the hotel's network</html>", b"", "cut"])
def test_what_is_no_dataset_never_reaches_the_cache(server, content):
    server.content = server.content[:-9] if content == "cut" else content
    with pytest.raises(UserError, match="cannot be downloaded"):
        d4rl.load(HOPPER)
    assert left_in_cache() == []


def test_size_is_bounded(server, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    with pytest.raises(UserError, match="more than the bound of 100000"):
        d4rl.load(HOPPER)
    monkeypatch.setattr(download, "MAX_BYTES", 1 << 60)
    server.claim = 1 << 59
    with pytest.raises(UserError, match="has no room"):
        d4rl.load(HOPPER)
    assert left_in_cache() == []


def test_two_at_once_download_once(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(d4rl.load(HOPPER).size)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert server.ranges == [None]
