"""The toy experiment: scores on known points, and from the runs to the figures, stopped and continued."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.parts.diffusion import Diffusion
from experiments import figure1_toy
from experiments.figure1_toy import DATA, Method, Toy, main, parse
from experiments.study.planned_run import continue_run
from experiments.toy import drawing
from experiments.toy.exact import ExactNetwork, chain_actions, solver_actions
from experiments.toy.scores import Scorer, coverage, jaccard, mmd, mode_shares, precision
from utils.data import bandit

CIRCLE, GAUSSIANS = "bandit-circle-v0", "bandit-gaussians-v0"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- Scores ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return bandit.load(CIRCLE).actions.astype(np.float64)


def test_a_copy_of_the_data_is_perfect(data: np.ndarray) -> None:
    assert jaccard(data, data) == precision(data, data) == coverage(data, data) == 1
    assert mmd(data[::5], data[::5]) == 0


def test_the_middle_scores_nothing(data: np.ndarray) -> None:
    middle = np.zeros((100, 2))
    assert jaccard(middle, data) == precision(middle, data) == coverage(middle, data) == 0
    assert mmd(middle, data[::5]) > 0.9


def test_scores_by_hand() -> None:
    """Two data points; one action on the first, one 0.1 from it, one 0.2 from it, one far off."""
    two = np.array([[1.0, 0.0], [-1.0, 0.0]])
    actions = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [5.0, 5.0]])
    assert jaccard(actions, two) == 0.25 and precision(actions, two) == 0.5
    assert coverage(actions, two) == 0.5  # the first has an action on it, the second none
    assert coverage(actions[1:], two) == 0  # 0.1 is too far


def test_mmd_by_hand() -> None:
    """Pairs at distances d have the kernel exp(-d^2 / 0.02); the square is unbiased, so pairs of a point with itself
    do not count."""
    left, right = np.array([[0.0, 0.0], [0.1, 0.0]]), np.array([[0.0, 0.2], [0.0, 0.2]])
    within = math.exp(-0.5)
    between = (math.exp(-2) + math.exp(-2.5)) / 2
    assert mmd(left, right) == pytest.approx(math.sqrt(within + 1 - 2 * between))


def test_what_the_scores_tell_apart(data: np.ndarray) -> None:
    """A blob covers but is not near; a circle without its noise is near and covers two thirds; a half covers half."""
    rng = np.random.default_rng(3)
    scorer = Scorer(CIRCLE)
    blob = scorer(0.7 * rng.standard_normal((1000, 2)))
    angle = rng.uniform(0, 2 * np.pi, 1000)
    thin = scorer(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    half = scorer(data[data[:, 0] > 0][:1000])
    again = scorer(figure1_toy.fresh_data(CIRCLE, [5])[5])
    assert blob["precision"] < 0.6 and blob["reward"] < 40
    assert thin["precision"] == 1 and thin["reward"] == 100 and thin["coverage"] == pytest.approx(0.67, abs=0.03)
    assert thin["radius"] == pytest.approx(1) and thin["radius_deviation"] == pytest.approx(0, abs=1e-12)
    assert half["precision"] == half["jaccard"] == 1 and half["coverage"] == pytest.approx(0.5, abs=0.03)
    assert again["precision"] > 0.99 and again["coverage"] > 0.95 and again["jaccard"] == 0
    assert again["radius_deviation"] == pytest.approx(0.05, abs=0.005)
    assert again["mmd"] < 0.03 < thin["mmd"] < blob["mmd"] < half["mmd"]


def test_shares_of_modes() -> None:
    actions = np.array([[0.8, -0.8], [0.8, -0.7], [-0.8, 0.8], [0.0, 0.0], [0.8, -0.6]])
    shares = mode_shares(actions)
    assert shares["mode of reward 5"] == 0.4 and shares["mode of reward 3"] == 0.2
    assert shares["mode of reward 0"] == 0 and shares["elsewhere"] == pytest.approx(0.4)
    assert sum(mode_shares(bandit.load(GAUSSIANS).actions).values()) == pytest.approx(1)


# --- The chain without error ----------------------------------------------------------------------------


def test_the_exact_network_of_one_data_point() -> None:
    """With a single action in the data the noise is known whatever x is, and the chain ends on that action."""
    diffusion = Diffusion("vp", 5, 1.2, "cpu")
    point = torch.tensor([[0.3, -0.6]])
    network = ExactNetwork(diffusion, point)
    noise = torch.randn(1, 5, 50, 2, generator=torch.Generator().manual_seed(1))
    step = torch.full((1, 50, 1), 3.0)
    diffused = diffusion.signal[3] * point + diffusion.spread[3] * noise[:, 0]
    torch.testing.assert_close(network.noise(diffused, step), noise[:, 0])
    actions = diffusion.sample(network, torch.zeros(1, 50, 1), noise)
    torch.testing.assert_close(actions, point.expand(1, 50, 2))


def test_the_exact_network_of_two_data_points() -> None:
    """Between -1 and 1 the mean of the action is tanh(signal x / spread^2), the posterior of two equal masses."""
    diffusion = Diffusion("vp", 4, 1.2, "cpu")
    network = ExactNetwork(diffusion, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    x = torch.linspace(-2, 2, 9)
    signal, spread = diffusion.signal[2], diffusion.spread[2]
    predicted = network.noise(torch.stack([x, 0 * x], dim=1).unsqueeze(0), torch.full((1, 9, 1), 2.0))[0, :, 0]
    torch.testing.assert_close(predicted, (x - signal * torch.tanh(signal * x / spread**2)) / spread)


def test_few_steps_alone_miss_the_circle() -> None:
    """No training makes up for what five steps miss; twenty steps draw a ring that is narrower than the data's."""
    scorer = Scorer(CIRCLE)
    few, many = (scorer(chain_actions(CIRCLE, T, 1000, seed=0)) for T in (5, 20))
    assert few["reward"] < 60 and few["radius"] < 0.85
    assert many["reward"] > 99 and many["precision"] == 1 and many["radius_deviation"] < 0.03


@pytest.mark.slow
def test_sfbcs_solver_alone_misses_the_circle_with_few_steps() -> None:
    """T = 5 and 20 end with a stride of order 2 over the last, steepest part; 15 with strides of order 2 and 1."""
    scorer = Scorer(CIRCLE)
    five, ten, fifteen, twenty = (scorer(solver_actions(CIRCLE, T, 1000, seed=0)) for T in (5, 10, 15, 20))
    assert five["reward"] < 20 and five["radius"] > 1.1 and twenty["radius"] > 1.05
    assert ten["reward"] > 85 and fifteen["reward"] > 98 and twenty["coverage"] < fifteen["coverage"] - 0.2


# --- Which runs -----------------------------------------------------------------------------------------


def test_the_grid() -> None:
    toy = Toy(parse([]))
    chains = [method for method in toy.runs if method.T]
    assert {method.T for method in chains} == {5, 10, 15, 20}
    assert {method.algo for method in toy.runs} == set(figure1_toy.ALGOS)
    for method, training in toy.runs.items():
        assert training.config.num_steps_per_epoch == 1000 and training.overrides.keys() <= {"diffusion_steps"}
        assert training.seeds == (0, 1, 2, 3, 4) and training.env_name == CIRCLE
        assert method.T is None or training.config.diffusion_steps == method.T
    quick = Toy(parse(["--quick", "--bandit", "gaussians"]))
    assert {(t.config.num_steps_per_epoch, t.seeds, t.env_name) for t in quick.runs.values()} == {
        (20, (0, 1), GAUSSIANS)
    }


@pytest.mark.parametrize("steps", ["10", "30", "-20"])
def test_steps_that_cannot_be_shared_out(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", steps]) == 2
    assert "--steps must be a multiple of 20" in capsys.readouterr().err


def test_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show", "--dir", str(tmp_path)]) == 2
    assert "no run is complete" in capsys.readouterr().err


# --- From runs to figures -------------------------------------------------------------------------------


SMALL = ["--steps", "20", "--seeds", "0,1", "--algos", "diffusion_bc", "diffcps", "--T", "2", "3"]


@pytest.mark.slow
def test_from_stopped_runs_to_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in processes; one run is there already, trained but without its actions. The second call runs nothing."""
    command = [*SMALL, "--dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--workers", "2"]
    toy = Toy(parse(command))
    begun = toy.runs[Method("diffcps", 2)]
    assert continue_run(begun.command(toy.base, figure1_toy.how_to_run(toy.options))) == 0
    assert toy.done(begun) == 0.99 and toy.samples() == {}
    trained = begun.folders(toy.base)[0] / "checkpoint.pt"
    before = trained.stat().st_mtime_ns
    assert main(command) == 0
    assert trained.stat().st_mtime_ns == before  # sampled, not trained again
    samples = toy.samples()
    assert list(samples) == list(toy.runs) and len(samples) == 4
    for by_seed in samples.values():
        assert all(actions.shape == (1000, 2) and np.abs(actions).max() < 1.2001 for actions in by_seed.values())
        assert not np.array_equal(by_seed[0], by_seed[1])
    check_files(tmp_path / "out", methods=4)
    monkeypatch.setattr(figure1_toy, "run_jobs", lambda jobs, function, progress, resources: pytest.fail("ran"))
    first = (tmp_path / "out" / "tables" / "toy.csv").read_bytes()
    assert main([*command, "--show"]) == 0
    assert (tmp_path / "out" / "tables" / "toy.csv").read_bytes() == first


def check_files(out: Path, methods: int) -> None:
    scores = rows(out / "tables" / "toy.csv")
    assert len(scores) == 2 * (1 + 4 + methods)  # the data's distribution, two exact samplers at two T
    assert {row["seed"] for row in scores} == {"0", "1"}
    assert all(row["jaccard"] == "0" and 0 <= float(row["precision"]) <= 1 for row in scores)
    points = rows(out / "figures" / "toy" / "circle-points.csv")
    assert len(points) == 1000 * (4 + methods)
    assert {(row["method"], row["T"]) for row in points} == {
        ("diffusion_bc", "2"), ("diffusion_bc", "3"), ("diffcps", "2"), ("diffcps", "3"),
        (drawing.CHAIN, "2"), (drawing.CHAIN, "3"), (drawing.SOLVER, "2"), (drawing.SOLVER, "3"),
    }  # fmt: skip
    for number in (1, 6, 7, 8, 9):
        for ending in ("png", "pdf"):
            assert (out / "figures" / "toy" / f"figure{number}.{ending}").stat().st_size > 5000
    text = (out / "tables" / "toy.md").read_text()
    assert "| DiffCPS | 3 |" in text and "20 gradient steps, 2 seeds" in text and "**figure9**" in text


def test_the_same_seed_gives_the_same_actions(tmp_path: Path) -> None:
    """And a seed gives the same alone as in company."""
    drawn = []
    for name, seeds in (("a", "0,1"), ("b", "1")):
        toy = Toy(parse(["--steps", "20", "--seeds", seeds, "--algos", "diffusion_bc", "--T", "2",
                         "--dir", str(tmp_path / name)]))  # fmt: skip
        training = toy.runs[Method("diffusion_bc", 2)]
        assert figure1_toy.train_and_sample(training.command(toy.base, figure1_toy.how_to_run(toy.options))) == 0
        drawn.append(toy.samples()[Method("diffusion_bc", 2)][1])
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)


# --- Drawing --------------------------------------------------------------------------------------------


def fake(task: str, which: list[tuple[str, int | None]]) -> tuple[dict, dict]:
    actions = figure1_toy.fresh_data(task, [0])[0]
    scorer = Scorer(task)
    value = {name: [score, score] for name, score in scorer(actions).items()}
    return dict.fromkeys(which, actions), {(DATA.algo, None): value, **dict.fromkeys(which, value)}


def test_the_layout_of_the_figures() -> None:
    chains = ("sfbc", "diffusion_ql", "diffcps", "diffusion_bc", drawing.CHAIN, drawing.SOLVER)
    which = [(algo, T) for algo in chains for T in (5, 10, 15, 20)]
    which += [(algo, None) for algo in ("awr", "td3_bc", "bcq", "bear")]
    drawn = {file: figure for file, _, figure in drawing.draw(CIRCLE, *fake(CIRCLE, which))}
    titles = {file: [axes.get_title() for axes in figure.axes if axes.get_title()] for file, figure in drawn.items()}
    over = [5, 10, 15, 20]
    assert titles["figure1"] == ["data", "AWR", "SfBC, T = 15", "DQL, T = 15", "DiffCPS, T = 15",
                                 *(f"DiffCPS, T = {T}" for T in over)]  # fmt: skip
    assert titles["figure7"] == [f"{name}, T = {T}" for name in ("DQL", "SfBC", "DiffCPS") for T in over]
    assert titles["figure8"] == ["TD3+BC", "BCQ", "BEAR", "DiffCPS, T = 15"]
    assert titles["figure9"] == [
        f"{name}, T = {T}" for name in ("diffusion BC", "exact chain", "exact solver") for T in over
    ]
    assert all(axes.get_aspect() == 1 for axes in drawn["figure1"].axes if axes.get_title())
    assert [len(axes.containers) for axes in drawn["figure6"].axes] == [
        5,
        5,
        5,
    ]  # DQL, SfBC, DiffCPS, and the two exact samplers
    dashed = [line for line in drawn["figure6"].axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_label() for line in dashed] == ["AWR"]


def test_the_gaussians_have_one_figure() -> None:
    which = [("diffcps", 5), ("td3_bc", None)]
    (drawn,) = drawing.draw(GAUSSIANS, *fake(GAUSSIANS, which))
    assert drawn[0] == "gaussians"
    axes = drawn[2].axes
    assert [a.get_title() for a in axes if a.get_title()] == ["data", "DiffCPS, T = 5", "TD3+BC"]
    assert sorted(text.get_text() for text in axes[0].texts) == ["0", "1.5", "3", "5"]
    best = fake(GAUSSIANS, which)[1]["diffcps", 5]["mode of reward 5"][0]
    assert 0.2 < best < 0.3 and axes[1].get_xlabel().startswith(f"best mode {100 * best:.0f} %")
