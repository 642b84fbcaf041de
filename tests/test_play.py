"""A trained run again: its evaluations come out as they were logged, its policy acts, is filmed, exported, collects."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import h5py
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import play
import run
from agents import AGENTS
from benchmarks.soak.soak import tiny
from tests.small import d4rl_file
from utils import sources, video
from utils.data import d4rl, minari
from utils.errors import UserError
from utils.runs.played import estimate, played_table, save_played

PUBLISHED = ["--eval_seeds", "published", "--quiet"]
QUICK = ("diffcps", "td3_bc")
some_algorithms = pytest.mark.parametrize(
    "algo", [algo if algo in QUICK else pytest.param(algo, marks=pytest.mark.slow) for algo in AGENTS]
)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Make:
    """The folder of a short run of an algorithm, two episodes an evaluation; each is trained once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(algo: str, seeds: str = "0,1", *more: str) -> Path:
        key = (algo, seeds, *more)
        if key not in made:
            base = tmp_path_factory.mktemp(algo)
            short = ("--diffusion_steps", "4") if algo in ("sfbc", "qgpo") else ()  # their chains are traced unrolled
            assert run.main(tiny(algo, seeds, data, base, "--eval_episodes", "2", *short, *more)) == 0
            made[key] = base / algo / "hopper-medium-v2"
        return made[key]

    return make


@pytest.fixture
def seed(trained: Make, tmp_path: Path) -> Path:
    """A copy of a seed's folder that a test may write into."""
    return Path(shutil.copytree(trained("diffcps", "0"), tmp_path / "run")) / "seed_0"


def rows(path: Path, step: int | None = None) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    return [row for row in found if step is None or int(row["step"]) == step]


# --- Evaluating again ---------------------------------------------------------------------------------


@some_algorithms
def test_the_logged_evaluation_comes_out_again(algo: str, trained: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit: CSV files hold every digit of a return."""
    folder = trained(algo)
    before = [(folder / f"seed_{k}" / "evaluations.csv").read_bytes() for k in (0, 1)]
    capsys.readouterr()
    assert play.main([str(folder), "--episodes", "2", *PUBLISHED]) == 0
    assert f"{algo} hopper-medium-v2, seeds 0, 1, step 12" in capsys.readouterr().out
    for k in (0, 1):
        logged = rows(folder / f"seed_{k}" / "evaluations.csv", 12)
        played = rows(folder / f"seed_{k}" / "played.csv")
        assert len(logged) == 2 and [{name: row[name] for name in logged[0]} for row in played] == logged
    assert before == [(folder / f"seed_{k}" / "evaluations.csv").read_bytes() for k in (0, 1)]


def test_a_seed_alone_and_an_earlier_checkpoint(seed: Path) -> None:
    for name, step in (("", 12), ("checkpoint.pt", 12), ("checkpoint.previous.pt", 8)):
        (seed / "played.csv").unlink(missing_ok=True)
        assert play.main([str(seed / name), "--episodes", "2", *PUBLISHED]) == 0
        logged = rows(seed / "evaluations.csv", step)
        assert [row["return"] for row in rows(seed / "played.csv")] == [row["return"] for row in logged]


@pytest.mark.slow
def test_a_compiled_run_is_played_compiled(trained: Make) -> None:
    folder = trained("diffcps", "0", "--execution", "compile", "--diffusion_steps", "2") / "seed_0"
    assert play.main([str(folder), "--episodes", "2", *PUBLISHED]) == 0
    (played, _), logged = rows(folder / "played.csv"), rows(folder / "evaluations.csv", 12)
    assert played["execution"] == "compile" and played["return"] == logged[0]["return"]


def test_each_way_of_playing_has_its_rows(seed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time replaces the rows of the first
        assert play.main([str(seed), "--episodes", "3", "--action_candidates", "1", "--quiet"]) == 0
        assert play.main([str(seed), "--episodes", "2", *PUBLISHED]) == 0
    played = rows(seed / "played.csv")
    how = ("eval_seeds", "episodes", "action_candidates", "backend", "execution")
    assert [tuple(row[name] for name in how) for row in played] == [
        *[("fresh", "3", "1", "mujoco", "eager")] * 3, *[("published", "2", "4", "mujoco", "eager")] * 2,
    ]  # fmt: skip
    assert "95 % interval" in capsys.readouterr().out


def test_a_run_that_does_not_say_its_sizes(seed: Path) -> None:
    config = json.loads((seed / "config.json").read_text())
    for name in ("state_dim", "action_dim", "max_action"):
        del config["dataset"][name]
    (seed / "config.json").write_text(json.dumps(config))
    assert play.main([str(seed), "--episodes", "2", *PUBLISHED]) == 0
    logged = rows(seed / "evaluations.csv", 12)
    assert [row["return"] for row in rows(seed / "played.csv")] == [row["return"] for row in logged]


def test_a_bandit_is_played_and_not_filmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = tiny("td3_bc", "0", "local", tmp_path, "--env_name", "bandit-circle-v0")
    del command[command.index("--dataset") : command.index("--dataset") + 2]
    assert run.main(command) == 0
    folder = tmp_path / "td3_bc" / "bandit-circle-v0" / "seed_0"
    assert play.main([str(folder), "--episodes", "5", "--quiet"]) == 0
    assert len(rows(folder / "played.csv")) == 5
    capsys.readouterr()
    assert play.main([str(folder), "--video", str(tmp_path / "film.gif"), "--quiet"]) == 2
    assert "bandit-circle-v0 has nothing to look at" in capsys.readouterr().err
    assert play.main([str(folder), "--collect", str(tmp_path / "data.hdf5")]) == 2
    assert not list(tmp_path.glob("*.gif")) and not list(tmp_path.glob("*.hdf5"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN/.."], None),
        (["RUN/../.."], "no checkpoint.pt in"),
        (["RUN/nowhere"], "name a seed's folder"),
        (["RUN", "--episodes", "0"], "--episodes must be at least 1, not 0"),
        (["RUN", "--video", "film.avi"], "a video is FILE.mp4 or FILE.gif, not film.avi"),
        (["RUN", "--video", "nowhere/film.gif"], "no folder"),
        (["RUN", "--device", "cuda:77"], "does not exist"),
        (["RUN/config.json"], "cannot be read as a file of weights"),
    ],
)
def test_a_mistake_gets_one_line(
    seed: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str | None
) -> None:
    code = play.main([argument.replace("RUN", str(seed)) for argument in [*arguments, "--quiet"]])
    line = capsys.readouterr().err.strip()
    assert (code, line) == (0, "") if words is None else (code == 2 and words in line and "\n" not in line)


def test_what_is_not_the_runs_is_refused(seed: Path, trained: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert play.main([str(trained("td3_bc")), "--action_candidates", "5"]) == 2
    assert "td3_bc has no action_candidates" in capsys.readouterr().err
    assert play.main([str(trained("td3_bc")), "--export", str(seed / "p.pt2")]) == 2
    assert "holds 2 seeds: name one seed's folder" in capsys.readouterr().err
    shutil.copy(trained("td3_bc") / "seed_0" / "checkpoint.pt", seed / "checkpoint.pt")
    assert play.main([str(seed)]) == 2
    assert "is of another run (td3_bc on hopper-medium-v2, seed 0)" in capsys.readouterr().err
    (seed / "config.json").unlink()
    assert play.main([str(seed)]) == 2
    assert "config.json" in capsys.readouterr().err


# --- What is said of it -------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    """t(0.975, 3) = 3.182446, t(0.975, 1) = 12.706205."""
    mean, deviation, error, low, high = estimate(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (mean, deviation, error) == pytest.approx((2.5, 1.2909944, 0.6454972))
    assert (low, high) == pytest.approx((2.5 - 3.182446 * 0.6454972, 2.5 + 3.182446 * 0.6454972), rel=1e-6)
    assert estimate(np.array([7.0]))[0] == 7 and np.isnan(estimate(np.array([7.0]))[1:]).all()
    seeds = {"0": (np.array([10.0, 20.0]), np.ones(2)), "3": (np.array([30.0, 30.0]), np.ones(2))}
    of_seeds = played_table(seeds).splitlines()[5].split()
    assert of_seeds == ["2", "seeds", "score", "22.5", "10.6", "7.5", "-72.8", "to", "117.8"]


def test_played_files_of_another_version_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "played.csv").write_text("step,return\n1,2\n")
    with pytest.raises(UserError, match="has other columns"):
        save_played(tmp_path, {}, [])
    assert (tmp_path / "played.csv").read_text() == "step,return\n1,2\n"


# --- The policy ---------------------------------------------------------------------------------------


@some_algorithms
def test_a_policy_acts_on_one_and_many(algo: str, trained: Make) -> None:
    place = trained(algo) / "seed_1"
    policy, again = play.Policy.load(place, seed=3), play.Policy.load(str(place), seed=3)
    states = np.random.default_rng(0).standard_normal((5, 11))
    one, many = policy(states[0]), policy(states)
    assert (one.shape, many.shape, many.dtype) == ((3,), (5, 3), np.float32) and np.abs(many).max() <= 1
    assert torch.equal(again(torch.as_tensor(states[0])), torch.as_tensor(one))  # seeded alike
    tensor = again(torch.as_tensor(states))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), many)
    rngs = [np.random.default_rng(4) for _ in range(2)]
    assert np.array_equal(policy.act(states, rngs[0]), policy.act(states, rngs[1]))
    with pytest.raises(UserError, match=r"an observation has 11 numbers, or is \[N, 11\]; not \[5, 4\]"):
        policy(states[:, :4])
    with pytest.raises(UserError, match="holds 2 seeds"):
        play.Policy.load(trained(algo))


def test_other_draws_other_actions(trained: Make) -> None:
    place, states = trained("diffcps") / "seed_0", np.zeros((50, 11), np.float32)
    actions = [play.Policy.load(place, seed=k)(states) for k in (0, 1)]
    assert not np.array_equal(*actions)
    assert not np.array_equal(actions[0], play.Policy.load(place, seed=0, action_candidates=1)(states))
    assert np.array_equal(actions[0], play.Policy.load(place / "checkpoint.pt")(states))


ALONE = """
import json, sys, torch
for name in ("agents", "utils", "play", "run", "hyperparameters"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported")
folder = sys.argv[1]
extra = {"policy.json": ""}
policy = torch.export.load(f"{folder}/policy.pt2", extra_files=extra).module()
states = torch.load(f"{folder}/states.pt", weights_only=True)
torch.manual_seed(5)
actions = [policy(states), policy(states[:1])]
weights = torch.load(f"{folder}/policy.weights.pt", weights_only=True)
torch.save([*actions, sorted(weights), json.loads(extra["policy.json"])["step"]], f"{folder}/actions.pt")
"""


@pytest.mark.slow
@some_algorithms
def test_an_exported_policy_acts_without_the_project(algo: str, trained: Make, tmp_path: Path) -> None:
    """The same actions, bit for bit, as the agent's from a generator of that seed; for any number of observations."""
    place, states = trained(algo) / "seed_1", torch.randn(9, 11)
    torch.save(states, tmp_path / "states.pt")
    assert play.main([str(place), "--export", str(tmp_path / "policy.pt2")]) == 0
    # -I: neither this folder nor $PYTHONPATH is looked in
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    many, one, names, step = torch.load(tmp_path / "actions.pt", weights_only=True)
    agent = play.Policy.load(place).agent
    generator = [torch.Generator().manual_seed(5)]
    assert torch.equal(many, agent.act(states[None], generator)[0])
    assert torch.equal(one, agent.act(states[None, :1], generator)[0])
    assert names == sorted(agent.published_state()[0]) and step == 12


def test_a_policy_collects(seed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{k}.hdf5" for k in range(3)]
    for k, file in enumerate(files):
        command = [str(seed), "--collect", str(file), "--transitions", "120", "--seed", str(k // 2), "--quiet"]
        assert play.main(command) == 0
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    with h5py.File(files[0]) as file:
        (behaviour,) = json.loads(file.attrs["behaviours"])
        assert len(file["actions"]) == 120 and np.abs(file["actions"]).max() <= 1
    assert behaviour["policy"] == play.Policy.load(seed).info and behaviour["policy"]["algo"] == "diffcps"
    assert d4rl.load("hopper-medium-v2", path=files[0]).size == 119  # the cut at the end is no transition
    assert play.main([str(seed), "--collect", str(files[0])]) == 2
    assert "exists; name another file" in capsys.readouterr().err


# --- Films --------------------------------------------------------------------------------------------


def frames_of(path: Path) -> np.ndarray:
    return np.stack([frame[..., :3] for frame in imageio.mimread(path, memtest=False)])


def watch(env_name: str) -> np.ndarray:
    """The first frame of a task; skips where OpenGL cannot draw."""
    environments = sources.choose(env_name).watched()
    environments.reset([np.random.default_rng(0)])
    try:
        return environments.frame()
    except UserError as error:
        pytest.skip(str(error))
    finally:
        environments.close()


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_film_shows_the_robot_move(seed: Path, tmp_path: Path, ending: str) -> None:
    if ending == "mp4" and find_spec("imageio_ffmpeg") is None:
        pytest.skip("imageio-ffmpeg is not installed")
    watch("hopper-medium-v2")
    film = tmp_path / f"film.{ending}"
    assert play.main([str(seed), "--video", str(film), *PUBLISHED]) == 0
    frames = frames_of(film)
    length = int(rows(seed / "evaluations.csv", 12)[0]["length"])
    assert frames.shape[1:] == (480, 480, 3) and 2 <= len(frames) <= (length + 1) // 4 + 1
    assert frames.mean() > 20 and frames.std() > 20
    assert (np.abs(np.diff(frames.astype(int), axis=0)).max(axis=(1, 2, 3)) > 50).all()  # each frame is another
    assert not (seed / "played.csv").exists() and [path.name for path in tmp_path.glob("*film*")] == [film.name]


def test_a_maze_is_seen_from_above_with_its_goal_and_walls() -> None:
    red, green, blue = watch("antmaze-umaze-v2").astype(int).transpose(2, 0, 1)
    goal = (green > 150) & (red < 100) & (blue < 120)
    walls = (red > blue + 60) & (red > green + 20)
    assert 20 < goal.sum() < 5000 and walls.mean() > 0.1


def test_a_film_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), video.Film(tmp_path / "film.gif", 20) as film:
        film.add(lambda: np.zeros((16, 16, 3), np.uint8))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        video.check(tmp_path / "film.mp4")


def test_a_film_goes_at_the_pace_of_its_frames(tmp_path: Path) -> None:
    """125 frames a second: every fourth is kept, 32 ms each."""
    with video.Film(tmp_path / "film.gif", 125) as film:
        for k in range(9):
            film.add(lambda k=k: np.full((16, 16, 3), 20 * k, np.uint8))
    frames = frames_of(tmp_path / "film.gif")
    assert frames[:, 0, 0, 0].tolist() == [0, 80, 160]
    assert imageio.get_reader(tmp_path / "film.gif").get_meta_data()["duration"] in (30, 32)


def test_a_set_of_minaris_is_watched_in_its_own_environment() -> None:
    watch("hopper-medium-v2")
    spec = minari.EnvironmentSpec("minari:some/set-v0", gymnasium.spec("Hopper-v5"), 20, None, None)
    environments = minari.MinariEnvs(spec, 1, render_mode="rgb_array")
    environments.reset([np.random.default_rng(0)])
    frame = environments.frame()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.std() > 5 and environments.fps == 125
    environments.close()
    blind = minari.MinariEnvs(spec, 1)
    blind.reset([np.random.default_rng(0)])
    with pytest.raises(UserError, match="Hopper-v5"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blind.frame()
    with pytest.raises(UserError, match="the environment of minari:some/set-v0 cannot be made"):
        minari.MinariEnvs(spec, 1, no_such_argument=1)


def test_tasks_without_an_environment_here_cannot_be_watched() -> None:
    with pytest.raises(UserError, match="takes the original stack"):
        sources.choose("pen-human-v1").watched()


pytestmark = pytest.mark.slow  # the whole file: seconds per test
