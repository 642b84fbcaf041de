"""The shipped settings against the published ones, and the order in which their sources count.

What compares with published numbers says so when it fails: after an edit of hyperparameters.py for a study of one's own
that is no error.

`fixtures/published_settings.json` lists the settings in the published code of DiffCPS, Diffusion-QL and DTQL
(github.com/felix-thu/DiffCPS, Zhendong-Wang/Diffusion-Policies-for-Offline-RL and
TianyuCodings/Diffusion_Trusted_Q_Learning), keys renamed to this project's words.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hyperparameters
from experiments.study import planned_run
from utils import options, tasks
from utils.data import bandit

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "published_settings.json").read_text())
OURS = {"lr": "learning_rate", "eval_interval_epochs": "eval_interval"}  # where the fixture's word differs
ROWS = [(algo, task) for algo in ("diffcps", "diffusion_ql", "dtql") for task in PUBLISHED[algo]]
TABLE3 = Path(__file__).parents[1] / "results" / "published" / "table3.csv"


def same(found: dict[str, Any], published: dict[str, Any], source: str) -> None:
    """Fails with the names of the settings that differ."""
    assert found.keys() == published.keys()
    differ = {name: (found[name], value) for name, value in published.items() if found[name] != value}
    assert not differ, (
        f"(here, {source}) differ: {differ}. Expected after you have edited hyperparameters.py; else wrong"
    )


def read_of(config: Any, published: dict[str, Any]) -> dict[str, Any]:
    """The config's values under the published names."""
    return {name: getattr(config, OURS.get(name, name)) for name in published}


def test_diffcps_has_table_3_of_the_paper() -> None:
    """In its order, cell by cell: the paper's table and its code agree everywhere."""
    with open(TABLE3, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(hyperparameters.PAPER_TASKS) == [row["env_name"] for row in rows]
    for row in rows:
        paper = {
            "learning_rate": float(row["learning_rate"]),
            "kappa": float(row["kappa"]),
            "reward_tune": row["reward_tune"],
            "max_q_backup": {"True": True, "False": False}[row["max_q_backup"]],
            "policy_interval": int(row["policy_interval"]),
            "lambda_min": float(row["lambda_clip"]),
        }
        assert len(paper) == len(row) - 1  # all columns but the task
        same(read_of(hyperparameters.get("diffcps", row["env_name"]), paper), paper, f"Table 3, {row['env_name']}")


@pytest.mark.parametrize(("algo", "task"), ROWS)
def test_every_task_has_the_published_settings(algo: str, task: str) -> None:
    ten = task.endswith("-v2") and not task.startswith("antmaze")
    published = PUBLISHED[algo][task] | {"eval_episodes": 10 if ten else 100}
    same(read_of(hyperparameters.get(algo, task), published), published, f"published code of {algo}, {task}")


@pytest.mark.parametrize(("algo", "task"), [row for row in ROWS if row[0] != "dtql"])
def test_the_chains_settings_are_the_published_ones(algo: str, task: str) -> None:
    common = PUBLISHED["diffcps_common"]
    names = ["batch_size", "discount", "tau", "ema_decay", "critic_learning_rate", "diffusion_steps", "beta_schedule"]
    names += ["action_candidates"] + (["lambda_learning_rate", "lambda_max"] if algo == "diffcps" else [])
    published = {name: common[name] for name in names} | {
        "ema_start": common["ema_start_step"],
        "ema_interval": common["ema_interval_steps"],
        "num_steps_per_epoch": common["steps_per_epoch"],
    }
    same(read_of(hyperparameters.get(algo, task), published), published, f"published code of {algo}, {task}")


@pytest.mark.parametrize("task", list(PUBLISHED["dtql"]))
def test_dtqls_common_settings_are_the_published_ones(task: str) -> None:
    common = PUBLISHED["dtql_common"]
    names = ["pretrain_epochs", "action_candidates", "sigma_max", "sigma_min", "sigma_data", "tau", "discount"]
    names += ["critic_learning_rate", "eval_interval_epochs"]
    tuned = common["reward_tune"]["antmaze" if task.startswith("antmaze") else "else"]
    published = {name: common[name] for name in names} | {"reward_tune": tuned, "grad_norm": 0}
    same(read_of(hyperparameters.get("dtql", task), published), published, f"published code of dtql, {task}")


@pytest.mark.parametrize("task", list(PUBLISHED["diffusion_ql"]))
def test_behaviour_cloning_runs_with_diffusion_qls_settings(task: str) -> None:
    """The published code has one table for both; cloning clips nothing and knows no critics."""
    config, row = hyperparameters.get("diffusion_bc", task), PUBLISHED["diffusion_ql"][task]
    published = {name: row[name] for name in ("lr", "num_epochs", "reward_tune", "top_k")} | {"grad_norm": 0}
    same(read_of(config, published), published, f"published code of diffusion_bc, {task}")
    assert not hasattr(config, "eta") and not hasattr(config, "max_q_backup")


# --- Which source counts ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(hyperparameters.CriticConfig):
    """An algorithm of the tests, so that they do not depend on what a row says today."""

    batch_size: int = 8  # another default; help and range are the base's
    width: float = hyperparameters.setting(2.0, "one line", above=0, below="length", alias="W")
    length: float = hyperparameters.setting(3.0, "another", at_most=10)
    warm: int = hyperparameters.setting(7, "a phase", at_least=0, scales=True)
    kind: str = hyperparameters.setting("a", "a word", one_of=("a", "b"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(hyperparameters.CONFIGS, "toy", ToyConfig)
    rows = {"antmaze": {"width": 1.0, "tau": 0.1, "eval_episodes": 4}, "kitchen": {"wdith": 1.0}}
    monkeypatch.setitem(hyperparameters.DOMAIN_SETTINGS, "toy", rows)
    monkeypatch.setitem(hyperparameters.TASK_SETTINGS, "toy", {"antmaze-umaze-v0": {"tau": 0.2, "warm": 1}})
    monkeypatch.setitem(hyperparameters.COMMON_SETTINGS, "antmaze", {"eval_episodes": 3, "length": 5.0})
    return "toy"


def test_default_then_domain_then_task_then_command_line(toy: str) -> None:
    config, found = hyperparameters.resolve(toy, "antmaze-umaze-v0", {"warm": 2, "discount": 0.5})
    assert found["batch_size"] == (8, "default") and found["kind"] == ("a", "default")
    assert found["length"] == (5.0, "domain antmaze")  # what every algorithm has there
    assert found["eval_episodes"] == (4, "domain antmaze") and found["width"] == (1.0, "domain antmaze")
    assert found["tau"] == (0.2, "task antmaze-umaze-v0")  # over the domain's 0.1
    assert found["warm"] == (2, "command line") and found["discount"] == (0.5, "command line")
    assert config == ToyConfig(**{name: value for name, (value, _) in found.items()})
    assert hyperparameters.explain(toy, "antmaze-umaze-v0", {"warm": 2, "discount": 0.5}) == found
    assert hyperparameters.get(toy, "antmaze-umaze-v0", warm=2, discount=0.5) == config
    assert hyperparameters.get(toy, "hopper-medium-v2") == ToyConfig()


def test_a_setting_is_one_line(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flag, help, range and published alias follow from it."""
    about = hyperparameters.settings(toy)
    assert list(about) == [field.name for field in dataclasses.fields(ToyConfig)]
    assert about["batch_size"] == hyperparameters.settings("diffcps")["batch_size"]
    assert [name for name, known in about.items() if known.scales] == ["warm"]
    parser = options.build_parser(toy, [toy])
    assert parser.parse_args(["--algo", toy, "--W", "1.5"]).width == 1.5
    assert "--width FLOAT, --W FLOAT" in parser.format_help() and "one line (default: 2.0)" in parser.format_help()
    shorter = planned_run.scaled(toy, "hopper-medium-v2", 0.5)
    assert shorter["warm"] == 4 and not {"width", "length"} & set(shorter)
    assert planned_run.scaled(toy, "hopper-medium-v2", 0.001)["warm"] == 1
    monkeypatch.setitem(hyperparameters.TASK_SETTINGS, "toy", {"hopper-medium-v2": {"warm": 0}})
    assert "warm" not in planned_run.scaled(toy, "hopper-medium-v2", 0.5)  # a phase that is off stays off


def test_the_bounds_of_a_setting(toy: str) -> None:
    def refused(match: str, task: str = "hopper-medium-v2", **given: Any) -> None:
        with pytest.raises(ValueError, match=match):
            hyperparameters.get(toy, task, **given)

    refused(r"width must be above 0, not 0\.0", width=0)
    refused(r"width must be below length \(3\.0\), not 3\.0", width=3)
    refused("length must be at most 10, not 11", length=11)
    refused("batch_size must be above 0, not 0", batch_size=0)  # the base's range
    refused("kind must be a or b, not 'c'", kind="c")
    refused("unknown setting 'wdith' for toy; known: .*width", task="kitchen-mixed-v0")  # misspelt in a row
    assert hyperparameters.get(toy, "hopper-medium-v2", width=10.0 - 1e-9, length=10).length == 10


def test_a_setting_without_help_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bare(hyperparameters.Config):
        width: float = 2.0

    monkeypatch.setitem(hyperparameters.CONFIGS, "bare", Bare)
    with pytest.raises(TypeError, match=r"Bare\.width has no help"):
        hyperparameters.settings("bare")


def test_a_table_has_a_value_per_column() -> None:
    made = hyperparameters.table(("kappa", "grad_norm"), {"a": (0.1, 1.0), "b": (0.2, 2.0)})
    assert made == {"a": {"kappa": 0.1, "grad_norm": 1.0}, "b": {"kappa": 0.2, "grad_norm": 2.0}}
    with pytest.raises(ValueError):
        hyperparameters.table(("kappa", "grad_norm"), {"a": (0.1,)})


def test_the_tasks_are_d4rls_and_the_bandits() -> None:
    known = hyperparameters.known_tasks()
    assert len(set(known)) == len(known)
    assert set(hyperparameters.DOMAINS) >= {*hyperparameters.COMMON_SETTINGS}
    left_out = {task for task in tasks.ids() if task.startswith("antmaze-eval-") or re.match("antmaze.*-v1", task)}
    assert set(known) == {*tasks.ids(), *bandit.ids()} - left_out


@pytest.mark.parametrize("algo", list(hyperparameters.CONFIGS))
def test_antmaze_v2_uses_the_v0_settings(algo: str) -> None:
    if not hyperparameters.runs_on(algo, "antmaze-umaze-v0"):
        return
    for task in (task for task in hyperparameters.DOMAINS["antmaze"] if task.endswith("-v0")):
        assert hyperparameters.get(algo, task[:-1] + "2") == hyperparameters.get(algo, task)


@pytest.mark.parametrize("algo", list(hyperparameters.CONFIGS))
def test_every_known_task_has_usable_settings(algo: str) -> None:
    for task in filter(lambda task: hyperparameters.runs_on(algo, task), hyperparameters.known_tasks()):
        config = hyperparameters.get(algo, task)
        assert isinstance(config, hyperparameters.CONFIGS[algo])
    with pytest.raises(AttributeError):
        config.batch_size = 1


def test_integers_stand_for_floats_and_nothing_else_is_converted() -> None:
    assert hyperparameters.get("dtql", "hopper-medium-v2", alpha=2).alpha == 2.0
    assert isinstance(hyperparameters.get("dtql", "hopper-medium-v2", alpha=2).alpha, float)


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algo", "task", "overrides", "message"),
    [
        ("dqn", "hopper-medium-v2", {}, "unknown algorithm 'dqn'; known: diffcps, diffusion_ql"),
        ("dtql", "hopper-v9", {}, "unknown task 'hopper-v9'; known: halfcheetah-random-v2"),
        ("dtql", "hopper-medium-v2", {"alhpa": 1.0}, "unknown setting 'alhpa' for dtql; known: .*alpha"),
        ("dtql", "hopper-medium-v2", {"eta": 1.0}, "unknown setting 'eta' for dtql"),
        ("diffusion_bc", "hopper-medium-v2", {"max_q_backup": True}, "unknown setting 'max_q_backup'"),
        ("dtql", "hopper-medium-v2", {"alpha": "big"}, "alpha must be float, not 'big'"),
        ("dtql", "hopper-medium-v2", {"lr_decay": 1}, "lr_decay must be bool, not 1"),
        ("dtql", "hopper-medium-v2", {"batch_size": 2.5}, "batch_size must be int, not 2.5"),
        ("dtql", "hopper-medium-v2", {"alpha": True}, "alpha must be float, not True"),
        ("dtql", "hopper-medium-v2", {"batch_size": 0}, "batch_size must be above 0, not 0"),
        ("dtql", "hopper-medium-v2", {"pretrain_epochs": -1}, "pretrain_epochs must be at least 0, not -1"),
        ("dtql", "hopper-medium-v2", {"expectile": 1.5}, "expectile must be at most 1, not 1.5"),
        ("dtql", "hopper-medium-v2", {"sigma_min": 90.0}, r"sigma_min must be below sigma_max \(80.0\), not 90.0"),
        ("dtql", "hopper-medium-v2", {"lr_decay_full": True}, "exclude each other"),
        ("diffusion_ql", "hopper-medium-v2", {"eta": -1.0}, "eta must be at least 0"),
        ("diffusion_ql", "hopper-medium-v2", {"top_k": -1}, "top_k must be at least 0"),
        ("diffusion_ql", "hopper-medium-v2", {"learning_rate": float("nan")}, "learning_rate must be a number"),
        ("bear", "hopper-medium-v2", {"mmd_kernel": "cubic"}, "mmd_kernel must be gaussian or laplacian, not 'cubic'"),
        ("bcq", "hopper-medium-v2", {"min_weight": 1.1}, "min_weight must be at most 1, not 1.1"),
        ("td3_bc", "hopper-medium-v2", {"target_noise": -0.1}, "target_noise must be at least 0"),
        ("diffuser", "antmaze-umaze-v0", {}, "diffuser does not run on antmaze-umaze-v0: its settings were published"),
        ("decision_diffuser", "kitchen-mixed-v0", {}, "does not run on kitchen-mixed-v0: .* take a locomotion task"),
        ("diffcps", "hopper-medium-v2", {"lambda_min": 200.0}, r"lambda_min must be at most lambda_max \(100.0\)"),
    ],
)
def test_what_no_run_could_use_is_refused(algo: str, task: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hyperparameters.get(algo, task, **overrides)


@pytest.mark.parametrize("algo", list(hyperparameters.CONFIGS))
def test_a_value_beyond_a_bound_is_refused(algo: str) -> None:
    """Every bound of every setting, so that none is only written down."""
    config = hyperparameters.get(algo, "hopper-medium-v2")
    for name, about in hyperparameters.settings(algo).items():
        kind = type(getattr(config, name))
        for limit, step in ((about.above, 0), (about.at_least, -1), (about.below, 0), (about.at_most, 1)):
            if limit is not None:
                bound = getattr(config, limit) if isinstance(limit, str) else limit
                with pytest.raises(ValueError, match=f"{name}.* must be |must be .*{name}"):
                    hyperparameters.get(algo, "hopper-medium-v2", **{name: kind(bound + step)})


def test_kappa_may_be_auto_and_brings_a_lambda_that_follows() -> None:
    config, found = hyperparameters.resolve("diffcps", "hopper-medium-v2", {"kappa": "auto"})
    assert found["kappa"] == ("auto", "command line") and config.kappa_slack == 0.01
    assert found["lambda_min"] == (1.0, "kappa auto")
    assert hyperparameters.get("diffcps", "hopper-medium-v2").lambda_min == 0
    assert hyperparameters.get("diffcps", "antmaze-umaze-v0", kappa="auto").lambda_min == 0.3  # as its row has it
    assert found["lambda_update"] == ("pi", "kappa auto") and hyperparameters.DiffCPSConfig().lambda_update == "ascent"
    assert hyperparameters.get("diffcps", "hopper-medium-v2", kappa="auto", lambda_update="ascent") == (
        dataclasses.replace(config, lambda_update="ascent")
    )
    assert found["lambda_init"] == (1.0, "task hopper-medium-v2")
    for given, message in (
        ({"kappa": "Auto"}, "kappa must be float, not 'Auto'"),
        ({"eta": "auto"}, "unknown setting"),
        ({"lambda_init": "auto"}, "lambda_init must be float, not 'auto'"),
        ({"kappa": "auto", "kappa_slack": -0.1}, "kappa_slack must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            hyperparameters.get("diffcps", "hopper-medium-v2", **given)


@pytest.mark.parametrize(
    ("source", "arguments", "line"),
    [
        ("d4rl", ["--env_name", "hopper-medium-v2"], ""),
        ("d4rl", ["--env_name", "antmaze-umaze-v2"], ""),
        ("d4rl", ["--env_name", "hopper-random-v2"], "kappa = 0.06 was tuned for other tasks: for these data there is"),
        ("/x/my.hdf5", ["--env_name", "hopper-medium-v2"], "kappa = 0.05 was tuned for D4RL's own set of this task"),
        ("local", ["--env_name", "walker2d-medium-v2"], "kappa = 0.03 was tuned for D4RL's own set of this task"),
        ("local", ["--env_name", "walker2d-medium-v2", "--kappa", "0.03"], ""),
        ("local", ["--env_name", "walker2d-medium-v2", "--kappa", "auto"], ""),
        ("local", ["--env_name", "walker2d-medium-v2", "--algo", "diffusion_ql"], ""),
    ],
)
def test_auto_is_suggested_for_data_that_nobody_tuned_kappa_for(source: str, arguments: list[str], line: str) -> None:
    given = options.parse(arguments, list(hyperparameters.CONFIGS))
    said = options.suggestion(given, options.resolve_settings(given)[1], source)
    assert said.startswith(line) and bool(said) == bool(line) and said.count("\n") == 0
