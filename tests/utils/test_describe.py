"""The one-screen description of a set, against counts made by hand."""

import json
import runpy
from pathlib import Path

import h5py
import numpy as np
import pytest

from utils import describe, tasks
from utils.data.doubts import guess_env_name
from utils.data.rows import Rows, read_rows

HOPPER = "hopper-medium-v2"


def make_rows(episodes: list[int], terminal: bool = True, seed: int = 0) -> Rows:
    """Episodes of the given lengths; states drift away from a start near zero, as a robot's do."""
    rng = np.random.default_rng(seed)
    states = np.concatenate([np.linspace(0, 5, n)[:, None] + rng.uniform(-0.01, 0.01, (n, 11)) for n in episodes])
    size = sum(episodes)
    ends = np.zeros(size, dtype=bool)
    ends[np.cumsum(episodes) - 1] = True
    return Rows(
        observations=states.astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(size, 3)).astype(np.float32),
        rewards=rng.uniform(0, 2, size=size).astype(np.float32),
        terminals=ends if terminal else np.zeros(size, dtype=bool),
        timeouts=np.zeros(size, dtype=bool) if terminal else ends,
    )


def changed(rows: Rows, **columns) -> Rows:
    return Rows(**{**vars(rows), **columns})


def write(path: Path, rows: Rows, **attributes) -> Path:
    with h5py.File(path, "w") as file:
        for key, column in vars(rows).items():
            if column is not None:
                file[key] = column
        file.attrs.update(attributes)
    return path


def suspicions(rows: Rows) -> str:
    return " | ".join(describe.summarize(rows, HOPPER)["suspicious"])


def test_numbers_of_a_small_set():
    rows = make_rows([10, 20, 5, 8, 12, 30])
    summary = describe.summarize(rows, HOPPER)
    assert (summary["rows"], summary["episodes"], summary["terminals"], summary["timeouts"]) == (85, 6, 6, 0)
    assert summary["transitions"] == 84  # the last row has no successor
    assert summary["lengths"] == [10, 20, 5, 8, 12, 30]
    np.testing.assert_allclose(summary["returns"][1], rows.rewards[10:30].sum(dtype=np.float64))
    np.testing.assert_allclose(
        summary["normalized_returns"], tasks.normalized_score(HOPPER, np.array(summary["returns"]))
    )
    np.testing.assert_array_equal(summary["actions"]["max"], rows.actions.max(0))
    np.testing.assert_array_equal(summary["states"]["min"], rows.observations.min(0))
    assert summary["suspicious"] == []


def test_timeouts_end_episodes_and_drop_rows():
    summary = describe.summarize(make_rows([10, 20, 5], terminal=False), HOPPER)
    assert (summary["episodes"], summary["terminals"], summary["timeouts"]) == (3, 0, 3)
    assert summary["transitions"] == 32
    assert summary["suspicious"] == []


def test_without_a_task_there_are_no_scores():
    summary = describe.summarize(make_rows([10, 20]))
    assert summary["normalized_returns"] is None and summary["env_name"] is None


def test_unfinished_last_episode_counts_and_is_named():
    rows = make_rows([10, 20])
    terminals = rows.terminals.copy()
    terminals[-1] = False
    rows = changed(rows, terminals=terminals)
    assert describe.summarize(rows, HOPPER)["lengths"] == [10, 20]
    assert suspicions(rows) == "the last episode is unfinished"


# --------------------------------------------------------------------------------------------------
# Suspicious things, one at a time
# --------------------------------------------------------------------------------------------------
def test_nan_is_named_with_its_first_row():
    rows = make_rows([10, 20])
    rows.observations[7, 3] = np.nan
    rows.rewards[12] = np.inf
    text = suspicions(rows)
    assert "observations: NaN or infinity in 1 rows, the first is row 7" in text
    assert "rewards: NaN or infinity in 1 rows, the first is row 12" in text


def test_constant_dimensions():
    rows = make_rows([10, 20])
    rows.observations[:, [2, 5]] = 1.0
    assert suspicions(rows) == "observations: dimension 2, 5 never changes"


def test_actions_out_of_the_box_and_on_its_edge():
    rows = make_rows([10, 20])
    rows.actions[4, 1] = -1.25
    assert suspicions(rows) == "actions: 1 rows leave the box [-1, 1], up to 1.25"
    rows = make_rows([10, 20])
    rows.actions[:, :2] = np.sign(rows.actions[:, :2])
    assert suspicions(rows) == "actions: 67% of the numbers lie on the edge of the box"


def test_missing_timeouts_and_doubled_ends():
    rows = make_rows([10, 20])
    assert "no key 'timeouts'" in suspicions(changed(rows, timeouts=None))
    assert "2 rows are terminal and timeout at once" in suspicions(changed(rows, timeouts=rows.terminals))


def test_unlabelled_ends_are_seen_by_their_resets():
    rows = make_rows([30] * 20)
    terminals = rows.terminals.copy()
    terminals[[29, 149]] = False
    text = suspicions(changed(rows, terminals=terminals))
    found = int(text.split(" rows look like a reset, the first is row ")[0])
    assert found == 2 and "no end is marked before" in text
    first = int(text.split("the first is row ")[1].split(",")[0])
    assert first == 30
    assert suspicions(rows) == ""


def test_episodes_beyond_the_time_limit():
    rows = make_rows([1500, 20])
    assert "1 episodes are longer than the time limit of 1000 steps" in suspicions(rows)


def test_repetitions():
    rows = make_rows([10, 20])
    rows.observations[5] = rows.observations[4]
    assert suspicions(rows) == "1 rows repeat the state of the row before"
    once = make_rows([10, 20])
    twice = Rows(**{key: np.concatenate([column, column]) for key, column in vars(once).items()})
    assert suspicions(twice) == "2 episodes repeat another one (same first state, return and length)"


def test_constant_rewards():
    rows = make_rows([10, 20])
    rows.rewards[:] = 1.0
    assert suspicions(rows) == "every reward is 1"


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hopper_medium_replay-v2.hdf5", "hopper-medium-replay-v2"),
        ("hopper-medium-replay.hdf5", "hopper-medium-replay-v2"),
        ("hopper-medium.hdf5", "hopper-medium-v2"),
        ("walker2d-medium-expert-v2-local-100000-seed0.hdf5", "walker2d-medium-expert-v2"),
        ("antmaze-umaze-diverse-v2-local-5-seed0.hdf5", "antmaze-umaze-diverse-v2"),
        ("antmaze-umaze.hdf5", "antmaze-umaze-v0"),
        ("Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5", "antmaze-medium-diverse-v2"),
        ("mine.hdf5", None),
        ("hopper.hdf5", None),
    ],
)
def test_task_by_file_name(name, expected):
    assert guess_env_name(Path("somewhere") / name) == expected


def test_the_screen_of_a_file(tmp_path, capsys):
    path = write(tmp_path / "hopper-medium.hdf5", make_rows([10, 20, 5]), description="Rebuilt; not official.")
    assert describe.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "Rebuilt; not official." in text and f"scored as {HOPPER}" in text
    assert "rows 35   transitions 34   episodes 3   terminals 3   timeouts 0" in text
    assert "suspicious: nothing seen" in text
    assert max(map(len, text.splitlines()[3:])) <= 100 and len(text.splitlines()) < 40
    histogram = [line for line in text.splitlines() if " … " in line and "(" not in line]
    assert sum(int(line.split()[-1]) for line in histogram) == 3


def test_the_screen_of_a_set_that_training_refuses(tmp_path, capsys):
    rows = make_rows([10, 20])
    rows.rewards[3] = np.nan
    assert describe.main([str(write(tmp_path / "mine.hdf5", rows))]) == 0
    text = capsys.readouterr().out
    assert "rewards: NaN or infinity in 1 rows" in text and "no reference scores" in text


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_module_is_the_command(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.hdf5", make_rows([10, 20]))
    monkeypatch.setattr("sys.argv", ["utils.describe", str(path)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("utils.describe", run_name="__main__")
    assert "episodes 2" in capsys.readouterr().out


def test_json_has_the_same_numbers(tmp_path, capsys):
    path = write(tmp_path / "a.hdf5", make_rows([10, 20]))
    assert describe.main([str(path), "--env_name", HOPPER, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["env_name"], found["episodes"], found["lengths"]) == (HOPPER, 2, [10, 20])


def test_a_d4rl_id_is_looked_up_in_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write(tmp_path / "hopper_medium-v2.hdf5", make_rows([10, 20]))
    assert describe.main([HOPPER]) == 0
    assert "episodes 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.hdf5"], "neither a file nor a D4RL id"),
        (["{folder}"], "is not a file"),
        (["{file}", "--env_name", "hopper-v9"], "unknown task 'hopper-v9'"),
        (["{file}", "--env_name", "walker2d-medium-v2"], "the task needs (30, 17)"),
    ],
)
def test_what_cannot_be_described_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    path = write(tmp_path / "a.hdf5", make_rows([10, 20]))
    assert describe.main([word.format(folder=tmp_path, file=path) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["hopper-medium", "antmaze-umaze"])
def test_rebuilt_sets_have_the_recorded_episodes(name):
    root = Path(__file__).resolve().parents[2]
    path = root.parent / "shared" / "data" / f"{name}.hdf5"
    if not path.exists():
        pytest.skip("the rebuilt sets in ../shared/data are not here")
    facts = json.loads((root / "tests" / "fixtures" / "qlearning_facts.json").read_text())["sets"][name]
    summary = describe.summarize(read_rows(path), facts["env_name"])
    assert (summary["episodes"], summary["transitions"]) == (facts["episodes"], facts["transitions"])
    assert np.mean(summary["returns"]) == pytest.approx(facts["mean_return"], rel=1e-9)
    assert np.mean(summary["normalized_returns"]) == pytest.approx(facts["mean_normalized"], rel=1e-9)
