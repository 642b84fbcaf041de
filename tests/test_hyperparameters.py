"""The settings' tables against the published ones, and the order in which their sources count.

`fixtures/published_settings.json` lists the settings in the published code of DiffCPS, Diffusion-QL and DTQL
(github.com/felix-thu/DiffCPS, Zhendong-Wang/Diffusion-Policies-for-Offline-RL and
TianyuCodings/Diffusion_Trusted_Q_Learning), keys renamed to this project's words.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import hyperparameters

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "published_settings.json").read_text())
OURS = {"lr": "learning_rate", "eval_interval_epochs": "eval_interval"}  # where the fixture's word differs
ROWS = [(algo, task) for algo in ("diffcps", "diffusion_ql", "dtql") for task in PUBLISHED[algo]]


@pytest.mark.parametrize(("algo", "task"), ROWS)
def test_every_task_has_the_published_settings(algo: str, task: str) -> None:
    config = hyperparameters.get(algo, task)
    for name, value in PUBLISHED[algo][task].items():
        assert getattr(config, OURS.get(name, name)) == value, name
    ten = task.endswith("-v2") and not task.startswith("antmaze")
    assert config.eval_episodes == (10 if ten else 100)


@pytest.mark.parametrize(("algo", "task"), [row for row in ROWS if row[0] != "dtql"])
def test_the_chains_settings_are_the_published_ones(algo: str, task: str) -> None:
    config, common = hyperparameters.get(algo, task), PUBLISHED["diffcps_common"]
    assert (config.ema_start, config.ema_interval) == (common["ema_start_step"], common["ema_interval_steps"])
    assert config.num_steps_per_epoch == common["steps_per_epoch"]
    same = ("batch_size", "discount", "tau", "ema_decay", "critic_learning_rate", "diffusion_steps", "beta_schedule")
    for name in (*same, "action_candidates"):
        assert getattr(config, name) == common[name], name
    if algo == "diffcps":
        assert config.lambda_learning_rate == common["lambda_learning_rate"]
        assert config.lambda_max == common["lambda_max"]


@pytest.mark.parametrize("task", list(PUBLISHED["dtql"]))
def test_dtqls_common_settings_are_the_published_ones(task: str) -> None:
    config, common = hyperparameters.get("dtql", task), PUBLISHED["dtql_common"]
    same = ("pretrain_epochs", "action_candidates", "sigma_max", "sigma_min", "sigma_data", "tau", "discount")
    for name in (*same, "critic_learning_rate"):
        assert getattr(config, name) == common[name], name
    assert config.eval_interval == common["eval_interval_epochs"]
    tuned = common["reward_tune"]
    assert config.reward_tune == tuned["antmaze" if task.startswith("antmaze") else "else"]
    assert config.grad_norm == 0


@pytest.mark.parametrize("task", list(PUBLISHED["diffusion_ql"]))
def test_behaviour_cloning_runs_with_diffusion_qls_settings(task: str) -> None:
    """The published code has one table for both; cloning clips nothing and knows no critics."""
    config, row = hyperparameters.get("diffusion_bc", task), PUBLISHED["diffusion_ql"][task]
    assert (config.learning_rate, config.num_epochs) == (row["lr"], row["num_epochs"])
    assert (config.reward_tune, config.top_k, config.grad_norm) == (row["reward_tune"], row["top_k"], 0)
    assert not hasattr(config, "eta") and not hasattr(config, "max_q_backup")


# --- Which source counts ------------------------------------------------------------------------------------------


def test_default_then_domain_then_task_then_command_line() -> None:
    found = hyperparameters.explain("diffusion_ql", "antmaze-umaze-v0", {"tau": 0.01})
    assert found["batch_size"] == (256, "default")
    assert found["num_epochs"] == (1000, "domain antmaze")
    assert found["max_q_backup"] == (False, "task antmaze-umaze-v0")  # over the domain's True
    assert found["tau"] == (0.01, "command line")
    found = hyperparameters.explain("diffusion_ql", "antmaze-umaze-v0", {"max_q_backup": True, "num_epochs": 3})
    assert found["max_q_backup"] == (True, "command line") and found["num_epochs"] == (3, "command line")


def test_no_table_repeats_the_value_that_holds_without_it() -> None:
    """A value stands once: a domain's row differs from the defaults, a task's from its domain's, or says it anew."""
    for algo, domains in hyperparameters.DOMAIN_SETTINGS.items():
        for domain, row in domains.items():
            for name, value in row.items():
                default = getattr(hyperparameters.CONFIGS[algo](), name)
                assert value != default, f"{algo} {domain} {name} is the default"
    for algo in ("diffusion_ql", "diffusion_bc", "dtql"):
        for task, row in hyperparameters.TASK_SETTINGS[algo].items():
            above = hyperparameters.DOMAIN_SETTINGS[algo].get(hyperparameters.domain(task), {})
            for name, value in row.items():
                shared = above.get(name, getattr(hyperparameters.CONFIGS[algo](), name))
                assert value != shared or name == "grad_norm", f"{algo} {task} {name} holds without the row"


@pytest.mark.parametrize("algo", list(hyperparameters.CONFIGS))
def test_antmaze_v2_uses_the_v0_settings(algo: str) -> None:
    for task in (task for task in hyperparameters.ANTMAZE if task.endswith("-v0")):
        assert hyperparameters.get(algo, task[:-1] + "2") == hyperparameters.get(algo, task)


@pytest.mark.parametrize("algo", list(hyperparameters.CONFIGS))
def test_every_known_task_has_usable_settings(algo: str) -> None:
    for task in hyperparameters.known_tasks():
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
        ("dtql", "hopper-medium-v2", {"expectile": 1.5}, r"expectile must lie in \[0, 1\], not 1.5"),
        ("dtql", "hopper-medium-v2", {"sigma_min": 90.0}, r"sigma_min \(90.0\) must be below sigma_max \(80.0\)"),
        ("dtql", "hopper-medium-v2", {"lr_decay_full": True}, "exclude each other"),
        ("diffusion_ql", "hopper-medium-v2", {"eta": -1.0}, "eta must be at least 0"),
        ("diffusion_ql", "hopper-medium-v2", {"top_k": -1}, "top_k must be at least 0"),
        ("diffusion_ql", "hopper-medium-v2", {"learning_rate": float("nan")}, "learning_rate must be a number"),
        ("bear", "hopper-medium-v2", {"mmd_kernel": "cubic"}, "mmd_kernel must be gaussian or laplacian, not 'cubic'"),
        ("bcq", "hopper-medium-v2", {"min_weight": 1.1}, r"min_weight must lie in \[0, 1\], not 1.1"),
        ("td3_bc", "hopper-medium-v2", {"target_noise": -0.1}, "target_noise must be at least 0"),
        ("diffcps", "hopper-medium-v2", {"lambda_min": 200.0}, r"lambda_min \(200.0\) is above lambda_max"),
    ],
)
def test_what_no_run_could_use_is_refused(algo: str, task: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hyperparameters.get(algo, task, **overrides)


def test_every_number_has_a_range() -> None:
    """Anything may be a multiplier's bound or start, and a negative gap switches CQL's multiplier off."""
    free = {"lambda_init", "lambda_max", "target_action_gap"}
    ranges = [hyperparameters.POSITIVE, hyperparameters.FRACTIONS, hyperparameters.NOT_NEGATIVE]
    bounded = [name for names in ranges for name in names]
    assert len(bounded) == len(set(bounded))
    numbers = {
        field.name
        for config in hyperparameters.CONFIGS.values()
        for field in dataclasses.fields(config)
        if type(field.default) in (int, float)
    }
    assert numbers == free | set(bounded)
