"""Every setting, once: default < preset < domain < task < command line.

A block per algorithm: its settings (default, help, range), then its rows per domain and per task. Edit them for your
own studies, or pass the flag of the same name. A new setting is one line in its algorithm's class. The numbers are
those of each algorithm's published code, which its class names; without a name it is DiffCPS's
(github.com/felix-thu/DiffCPS) or, for Diffusion-QL and DTQL, their authors'. This file imports nothing of the project.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = dict[str, Row]


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a setting beside its default. A bound may be the name of another setting."""

    help: str
    above: float | str | None = None
    at_least: float | str | None = None
    below: float | str | None = None
    at_most: float | str | None = None
    one_of: tuple[str, ...] = ()
    auto: bool = False  # `auto` may stand for the number, and is suggested for data that nobody tuned the number for
    excludes: str = ""  # another switch that may not be on at the same time
    alias: str = ""  # the published command's name of the flag
    scales: bool = False  # the length of a phase, which a shortened run shortens too


def setting(default: Any, help: str, **about: Any) -> Any:
    """A field of a dataclass of settings. `about`: the other fields of `About`.

    A class below may give the same setting another default by a plain `name: type = value`; the rest is kept.
    """
    return dataclasses.field(default=default, metadata={"about": About(help=help, **about)})


def table(columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Rows:
    """Rows of settings from a table with a task per line; None leaves a setting to a preset or its default.

    Raises ValueError for a line with a value too few or many.
    """
    pairs = {task: zip(columns, values, strict=True) for task, values in rows.items()}
    return {task: {name: value for name, value in own if value is not None} for task, own in pairs.items()}


# --- What several algorithms share ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every algorithm reads: the data, the length of a run, evaluation, and the shared optimiser settings."""

    reward_tune: str = setting(
        "no",
        "rewards as the learner sees them: no, normalize, iql_locomotion, iql_returns, return_range, iql_antmaze, "
        "cql_antmaze or antmaze",
    )
    batch_size: int = setting(256, "transitions per gradient step", above=0)
    num_epochs: int = setting(1000, "length of the run in epochs", above=0)
    num_steps_per_epoch: int = setting(1000, "gradient steps per epoch", above=0)
    eval_interval: int = setting(50, "epochs between evaluations", above=0)
    eval_episodes: int = setting(10, "episodes per evaluation", above=0)
    learning_rate: float = setting(3e-4, "Adam's rate for the policy", above=0)
    lr_decay: bool = setting(False, "cosine decay of the rates as published: it ends at 0.999 of the start")
    lr_decay_full: bool = setting(False, "cosine decay of the rates that ends at zero", excludes="lr_decay")
    # Of the published codes DiffCPS's and Diffusion-QL's alone clip.
    grad_norm: float = setting(0.0, "clip every network's gradient at this norm; 0: never", at_least=0)
    hidden_dim: int = setting(256, "width of the networks' hidden layers", above=0)


@dataclass(frozen=True, kw_only=True)
class ValueConfig(Config):
    """What every algorithm with a value function reads."""

    critic_learning_rate: float = setting(3e-4, "Adam's rate for the critics", above=0)
    discount: float = setting(0.99, "discount factor", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ValueConfig):
    """A value function with target networks."""

    tau: float = setting(0.005, "rate of the target critics' average", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class AverageConfig(CriticConfig):
    """Diffusion-QL's frame, also DiffCPS's and DTQL's: the critics' choice among actions, and an averaged policy.

    Their codes have one rate of the critics for all tasks, whatever the policy's is.
    """

    action_candidates: int = setting(50, "actions per state at evaluation; a softmax of min Q draws one", above=0)
    ema_decay: float = setting(0.995, "decay of the policy's average", at_least=0, at_most=1)
    ema_start: int = setting(1000, "gradient step from which that average moves", at_least=0)
    ema_interval: int = setting(5, "gradient steps between its moves", above=0)


@dataclass(frozen=True, kw_only=True)
class ChainConfig(Config):
    """What every policy with a variance-preserving diffusion chain reads."""

    diffusion_steps: int = setting(5, "steps T of the diffusion chain", above=0, alias="T")
    beta_schedule: str = setting("vp", "noise schedule: vp, linear or cosine")


@dataclass(frozen=True, kw_only=True)
class ImplicitQConfig(CriticConfig):
    """What every algorithm with implicit Q-learning's critics reads; ikostrikov/implicit_q_learning, configs/."""

    lr_decay: bool = setting(True, "cosine decay of the policy's rate alone, stepped at every update, ending at zero")
    expectile: float = setting(0.7, "expectile of min Q that V learns", at_least=0, at_most=1)


# What holds in a domain for every algorithm; an algorithm's own row goes before it.
COMMON_SETTINGS: Rows = {
    "antmaze": {"eval_episodes": 100},
    "adroit": {"eval_episodes": 100},
    "kitchen": {"eval_episodes": 100},
    # 20,000 steps are the paper's. Diffusion-QL's toy code has a width of 128 and batches of 100; these take about a
    # quarter of the time, so that all methods of the toy experiment, T up to 20, train on two cores in 40 minutes. The
    # rows of policies that denoise have a rate of 1e-3: with 3e-4 a clone of the circle (T = 20, batches of 64) earns
    # 48 percent after 10,000 steps and 97 after 20,000, with 1e-3 it earns 97 from 10,000 on.
    "bandit": {"num_epochs": 20, "eval_interval": 5, "eval_episodes": 100, "batch_size": 32, "hidden_dim": 64},
}

CONFIGS: dict[str, type[Config]] = {}  # every algorithm's settings, in the order of the blocks below
DOMAIN_SETTINGS: dict[str, Rows] = {}
TASK_SETTINGS: dict[str, Rows] = {}
PRESETS: dict[str, dict[str, Rows]] = {}  # algorithm -> a setting -> the row that a value of it stands for

# --- DiffCPS ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiffCPSConfig(AverageConfig, ChainConfig):
    """DiffCPS (He et al. 2023): the constraint and its multiplier lambda."""

    num_epochs: int = 2000
    grad_norm: float = 1.0
    max_q_backup: bool = setting(False, "take the best of 10 next actions in the critics' target")
    kappa: float | str = setting(
        0.06,
        "bound on the denoising loss that lambda enforces; auto: (1 + kappa_slack) times what a clone of the data "
        "attains, and a lambda that follows",
        at_least=0,
        auto=True,
        alias="target_kl",
    )
    kappa_slack: float = setting(
        0.2, "with --kappa auto (which brings 0.01): share of the clone's loss that the policy may be above", at_least=0
    )
    kappa_opening: int = setting(0, "with --kappa auto: gradient steps over which the slack grows from 0",
                                 at_least=0, scales=True)  # fmt: skip
    lambda_init: float = setting(1.0, "lambda at the start")
    lambda_min: float = setting(0.0, "least lambda used; --kappa auto brings 1", at_least=0, at_most="lambda_max")
    lambda_max: float = setting(100.0, "largest lambda used")
    lambda_learning_rate: float = setting(3e-5, "Adam's rate for lambda", above=0)
    lambda_anti_windup: bool = setting(False, "clamp the stored lambda as well as the used one")
    lambda_update: str = setting(
        "ascent", "how lambda moves: by Adam up its gradient, or pi, set by a controller", one_of=("ascent", "pi")
    )
    lambda_proportional: float = setting(3.0, "with --lambda_update pi: K_P, of the relative violation", at_least=0)
    lambda_integral: float = setting(0.02, "with --lambda_update pi: K_I, of its sum", at_least=0)
    policy_interval: int = setting(2, "policy and lambda move every so many gradient steps", above=0)


CONFIGS["diffcps"] = DiffCPSConfig
# With a larger slack, or a smaller lambda, Q rules before it knows anything (docs/results.md).
PRESETS["diffcps"] = {"kappa": {"auto": {"lambda_update": "pi", "kappa_slack": 0.01, "lambda_min": 1.0}}}
DOMAIN_SETTINGS["diffcps"] = {
    "antmaze": {"num_epochs": 1000},
    "adroit": {"eval_episodes": 10},  # neither the paper nor its code has Adroit or Kitchen
    "kitchen": {"eval_episodes": 10},
    # One candidate: the policy itself, as Diffusion-QL's toy code draws it.
    "bandit": {"action_candidates": 1, "learning_rate": 1e-3},
}
# Table 3 of the paper line by line; the last two columns are in its code alone. lambda_min is its lambda_clip; where
# that is 0.0, the default, it is left to --kappa auto's floor.
TASK_SETTINGS["diffcps"] = table(
    ("learning_rate", "kappa", "reward_tune", "max_q_backup", "policy_interval", "lambda_min",
     "lambda_init", "grad_norm"),
    {
        #                                learning       reward         max_q  policy   lambda lambda grad
        #                                rate     kappa tune           backup interval min    init   norm
        "halfcheetah-medium-expert-v2": (3e-4,    0.04, "no",          False, 2,       None,  1.0,   7.0),
        "hopper-medium-expert-v2":      (3e-4,    0.03, "no",          False, 2,       None,  1.0,   5.0),
        "walker2d-medium-expert-v2":    (3e-4,    0.04, "no",          False, 2,       None,  1.0,   5.0),
        "halfcheetah-medium-v2":        (3e-4,    0.06, "no",          False, 2,       None,  1.0,   9.0),
        "hopper-medium-v2":             (3e-4,    0.05, "no",          False, 2,       None,  1.0,   9.0),
        "walker2d-medium-v2":           (3e-4,    0.03, "no",          False, 2,       None,  1.0,   1.0),
        "halfcheetah-medium-replay-v2": (3e-4,    0.06, "no",          False, 2,       None,  1.0,   2.0),
        "hopper-medium-replay-v2":      (3e-4,    0.03, "no",          False, 2,       None,  1.0,   4.0),
        "walker2d-medium-replay-v2":    (3e-4,    0.03, "no",          False, 2,       None,  1.0,   4.0),
        "antmaze-umaze-v0":             (3e-4,    0.20, "cql_antmaze", False, 2,       0.3,   3.0,   2.0),
        "antmaze-umaze-diverse-v0":     (3e-4,    0.09, "cql_antmaze", True,  2,       0.3,   3.0,   3.0),
        "antmaze-medium-play-v0":       (1e-3,    0.30, "cql_antmaze", True,  2,       0.3,   1.0,   2.0),
        "antmaze-medium-diverse-v0":    (3e-4,    0.20, "cql_antmaze", True,  2,       0.3,   1.0,   1.0),
        "antmaze-large-play-v0":        (3e-4,    0.20, "cql_antmaze", True,  4,       0.3,   0.5,   10.0),
        "antmaze-large-diverse-v0":     (3e-4,    0.20, "cql_antmaze", True,  4,       0.3,   0.5,   7.0),
    },
)  # fmt: skip

# The 15 tasks of Tables 1 and 3, in their order.
PAPER_TASKS: tuple[str, ...] = tuple(TASK_SETTINGS["diffcps"])

# --- Diffusion-QL -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiffusionQLConfig(AverageConfig, ChainConfig):
    """Diffusion-QL (Wang et al. 2023): the denoising loss plus eta times the Q term."""

    num_epochs: int = 2000
    grad_norm: float = 1.0
    max_q_backup: bool = setting(False, "take the best of 10 next actions in the critics' target")
    eta: float = setting(1.0, "weight of the value term beside the denoising loss", at_least=0)
    top_k: int = setting(1, "offline model selection: rank of the evaluation's bc_loss, 0 the smallest", at_least=0)


CONFIGS["diffusion_ql"] = DiffusionQLConfig
DOMAIN_SETTINGS["diffusion_ql"] = {
    "antmaze": {"reward_tune": "cql_antmaze", "num_epochs": 1000, "max_q_backup": True},
    "adroit": {"reward_tune": "normalize", "num_epochs": 1000, "learning_rate": 3e-5, "top_k": 2},
    "kitchen": {"num_epochs": 1000, "eta": 0.005, "top_k": 2},
    "bandit": {"action_candidates": 1, "learning_rate": 1e-3},
}
TASK_SETTINGS["diffusion_ql"] = {
    "halfcheetah-medium-v2": {"grad_norm": 9.0},
    "hopper-medium-v2": {"grad_norm": 9.0, "top_k": 2},
    "walker2d-medium-v2": {"grad_norm": 1.0},
    "halfcheetah-medium-replay-v2": {"grad_norm": 2.0, "top_k": 0},
    "hopper-medium-replay-v2": {"grad_norm": 4.0, "top_k": 2},
    "walker2d-medium-replay-v2": {"grad_norm": 4.0},
    "halfcheetah-medium-expert-v2": {"grad_norm": 7.0, "top_k": 0},
    "hopper-medium-expert-v2": {"grad_norm": 5.0, "top_k": 2},
    "walker2d-medium-expert-v2": {"grad_norm": 5.0},
    "antmaze-umaze-v0": {"eta": 0.5, "grad_norm": 2.0, "max_q_backup": False, "top_k": 2},
    "antmaze-umaze-diverse-v0": {"eta": 2.0, "grad_norm": 3.0, "top_k": 2},
    "antmaze-medium-play-v0": {"eta": 2.0, "grad_norm": 2.0, "learning_rate": 1e-3},
    "antmaze-medium-diverse-v0": {"eta": 3.0, "grad_norm": 1.0},
    "antmaze-large-play-v0": {"eta": 4.5, "grad_norm": 10.0, "top_k": 2},
    "antmaze-large-diverse-v0": {"eta": 3.5, "grad_norm": 7.0},
    "pen-human-v1": {"eta": 0.15, "grad_norm": 7.0},
    "pen-cloned-v1": {"eta": 0.1, "grad_norm": 8.0},
    "kitchen-complete-v0": {"num_epochs": 250, "grad_norm": 9.0},
    "kitchen-partial-v0": {"grad_norm": 10.0},
    "kitchen-mixed-v0": {"grad_norm": 10.0, "top_k": 0},
}

# --- Diffusion behaviour cloning --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiffusionBCConfig(ChainConfig):
    """Diffusion behaviour cloning: the denoising loss alone. The published code has one table for it and Diffusion-QL,
    and clips nothing here."""

    num_epochs: int = 2000
    top_k: int = setting(1, "offline model selection: rank of the evaluation's bc_loss, 0 the smallest", at_least=0)


def _without_critics(rows: Rows) -> Rows:
    """Diffusion-QL's rows as far as behaviour cloning reads them."""
    unread = ("eta", "grad_norm", "max_q_backup", "action_candidates")
    return {name: {k: v for k, v in row.items() if k not in unread} for name, row in rows.items()}


CONFIGS["diffusion_bc"] = DiffusionBCConfig
DOMAIN_SETTINGS["diffusion_bc"] = _without_critics(DOMAIN_SETTINGS["diffusion_ql"])
TASK_SETTINGS["diffusion_bc"] = _without_critics(TASK_SETTINGS["diffusion_ql"])

# --- DTQL -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DTQLConfig(AverageConfig):
    """DTQL (Chen et al. 2024): a behaviour policy, and a one-step policy held near it by the trust-region loss.

    `num_epochs` counts from the end of the pretraining.
    Noise levels are log-logistic around sigma_data, between sigma_min and sigma_max. The published code bounds denoised
    actions at 1 whatever the action box.
    """

    lr_decay: bool = setting(False, "cosine decay of the rates, stepped at every update, ending at zero")
    action_candidates: int = 1024
    pretrain_epochs: int = setting(50, "epochs of behaviour policy and critics before step 0", at_least=0, scales=True)
    alpha: float = setting(5.0, "weight of the trust-region loss", at_least=0)
    gamma: float = setting(0.0, "weight of the one-step policy's negative log-likelihood of the data", at_least=0)
    expectile: float = setting(0.7, "expectile of min Q that V learns", at_least=0, at_most=1)
    sigma_min: float = setting(0.002, "least noise level", above=0, below="sigma_max")
    sigma_max: float = setting(80.0, "largest noise level", above=0)
    sigma_data: float = setting(0.5, "deviation of the actions that the preconditioning assumes", above=0)
    clip_denoised: float = setting(1.0, "bound of denoised actions", above=0)


CONFIGS["dtql"] = DTQLConfig
DOMAIN_SETTINGS["dtql"] = {
    "antmaze": {"reward_tune": "iql_antmaze", "batch_size": 2048, "alpha": 1.0, "gamma": 1.0, "expectile": 0.9},
    "adroit": {"alpha": 1500.0},
    "kitchen": {"num_epochs": 500, "alpha": 200.0, "lr_decay": True},
    "bandit": {"pretrain_epochs": 5, "action_candidates": 1, "learning_rate": 1e-3},
}
TASK_SETTINGS["dtql"] = {
    "halfcheetah-medium-v2": {"alpha": 1.0},
    "halfcheetah-medium-replay-v2": {},
    "halfcheetah-medium-expert-v2": {"alpha": 50.0},
    "hopper-medium-v2": {"learning_rate": 1e-4, "lr_decay": True},
    "hopper-medium-replay-v2": {},
    "hopper-medium-expert-v2": {"alpha": 20.0},
    "walker2d-medium-v2": {"lr_decay": True},
    "walker2d-medium-replay-v2": {"lr_decay": True},
    "walker2d-medium-expert-v2": {"lr_decay": True},
    "antmaze-umaze-v0": {"num_epochs": 500},
    "antmaze-umaze-diverse-v0": {"num_epochs": 500, "learning_rate": 3e-5, "lr_decay": True},
    "antmaze-medium-play-v0": {"num_epochs": 400},
    "antmaze-medium-diverse-v0": {"num_epochs": 400},
    "antmaze-large-play-v0": {"num_epochs": 350},
    "antmaze-large-diverse-v0": {"num_epochs": 300, "alpha": 0.5},
    "pen-human-v1": {"num_epochs": 300, "learning_rate": 3e-5, "lr_decay": True, "expectile": 0.9},
    "pen-cloned-v1": {"num_epochs": 200, "learning_rate": 1e-5},
    "kitchen-complete-v0": {"learning_rate": 1e-4},
    "kitchen-partial-v0": {"num_epochs": 1000, "learning_rate": 1e-4, "alpha": 100.0},
    "kitchen-mixed-v0": {},
    "bandit-circle-v0": {"clip_denoised": 1.2},  # the box
}

# --- Gaussian behaviour cloning ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BCConfig(Config):
    """Behaviour cloning with a Gaussian; length and network of TD3+BC's code (sfujim/TD3_BC), whose table has it."""

    sample_actions: bool = setting(False, "act by a sample of the policy; else by its mean")


CONFIGS["bc"] = BCConfig
DOMAIN_SETTINGS["bc"] = {"bandit": {"sample_actions": True}}  # the figures show a policy's distribution

# --- AWR --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AWRConfig(ValueConfig):
    """AWR (Peng et al. 2019): awr_configs.py and learning/awr_agent.py of its code (xbpeng/awr); rates are Adam's.

    `temperature` is the paper's beta, of advantages that are normalised over the data; `plan_interval` the policy's
    steps per iteration.
    """

    td_lambda: float = setting(0.95, "lambda of the TD(lambda) returns", at_least=0, at_most=1)
    temperature: float = setting(1.0, "temperature of the advantage weights", above=0)
    weight_max: float = setting(20.0, "largest advantage weight", above=0)
    plan_interval: int = setting(1000, "gradient steps between new returns of the whole dataset", above=0)
    action_std: float = setting(0.4, "deviation of the policy, in units of the action box", above=0)
    sample_actions: bool = setting(False, "act by a sample of the policy; else by its mean")


CONFIGS["awr"] = AWRConfig
DOMAIN_SETTINGS["awr"] = {
    "antmaze": {"action_std": 0.2},  # the deviation of the published Ant
    "bandit": {"sample_actions": True},  # the figures show a policy's distribution
}

# --- TD3+BC -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TD3BCConfig(CriticConfig):
    """TD3+BC (Fujimoto & Gu 2021): main.py of its code (sfujim/TD3_BC) has one set of settings for all tasks."""

    tau: float = setting(0.005, "rate of the targets' averages, which move with the policy", at_least=0, at_most=1)
    policy_interval: int = setting(2, "policy and targets move every so many gradient steps", above=0)
    target_noise: float = setting(
        0.2, "deviation of the noise on the target's actions, in units of the action box", at_least=0
    )
    target_noise_clip: float = setting(0.5, "bound of that noise, in units of the action box", at_least=0)
    alpha: float = setting(2.5, "weight of the value term, which is divided by mean |Q|", at_least=0)
    normalize_states: bool = setting(True, "give the networks states of mean 0 and deviation 1 over the data")


CONFIGS["td3_bc"] = TD3BCConfig
DOMAIN_SETTINGS["td3_bc"] = {
    # The paper has locomotion alone. AntMaze's rewards as CORL's configs/offline/td3_bc/antmaze have them.
    "antmaze": {"reward_tune": "iql_antmaze"},
}

# --- BCQ --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BCQConfig(CriticConfig):
    """BCQ (Fujimoto et al. 2019): continuous_BCQ/ of its code (sfujim/BCQ) has one set of settings for all tasks.

    Hidden layers are 400 and 300 wide as published.
    D4RL's evaluation (Fu et al. 2020) has the same settings and the data's own rewards everywhere. `min_weight` is the
    paper's lambda.
    """

    batch_size: int = 100
    learning_rate: float = setting(1e-3, "Adam's rate for the perturbation", above=0)
    hidden_dim: int = setting(400, "width of the first hidden layer; the second has three quarters of it", above=0)
    vae_hidden_dim: int = setting(750, "width of the behaviour model's hidden layers", above=0)
    vae_learning_rate: float = setting(1e-3, "Adam's rate for the behaviour model", above=0)
    critic_learning_rate: float = 1e-3
    phi: float = setting(
        0.05, "largest perturbation of the behaviour model's actions, in units of the action box", at_least=0
    )
    min_weight: float = setting(0.75, "weight of min Q in the target; the rest is max Q's", at_least=0, at_most=1)
    action_candidates: int = setting(100, "actions per state at evaluation, of which the critics choose one", above=0)


CONFIGS["bcq"] = BCQConfig
DOMAIN_SETTINGS["bcq"] = {
    "bandit": {"vae_hidden_dim": 128, "action_candidates": 1},  # a policy's distribution, not its Q's highest point
}

# --- BEAR -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BEARConfig(CriticConfig):
    """BEAR (Kumar et al. 2019) as its authors tuned it for D4RL: bear/ of rail-berkeley/d4rl_evaluations.

    Kernel and sigma of locomotion are those that its README.md gives for the results in D4RL's paper. Where it names
    none, the defaults of examples/bear_hdf5_d4rl.py stand. That example runs 3,000 epochs; the length here is that of
    the other classic methods.
    """

    learning_rate: float = 1e-4
    vae_hidden_dim: int = setting(750, "width of the behaviour model's hidden layers", above=0)
    vae_learning_rate: float = setting(3e-4, "Adam's rate for the behaviour model", above=0)
    alpha_learning_rate: float = setting(1e-3, "Adam's rate for the multiplier", above=0)
    min_weight: float = setting(0.75, "weight of min Q in the target; the rest is max Q's", at_least=0, at_most=1)
    mmd_kernel: str = setting(
        "gaussian",
        "kernel of the distance between policy and behaviour model: gaussian or laplacian",
        one_of=("gaussian", "laplacian"),
    )
    mmd_sigma: float = setting(50.0, "its width; it stands where a Gaussian has its variance", above=0)
    mmd_samples: int = setting(4, "actions per state of each in that distance", above=0)
    mmd_threshold: float = setting(0.05, "bound epsilon on that distance, which the multiplier enforces", at_least=0)
    warmup_steps: int = setting(
        40_000, "first steps, in which the policy only follows the behaviour model", at_least=0, scales=True
    )
    action_candidates: int = setting(100, "actions per state at evaluation, of which the critics choose one", above=0)


CONFIGS["bear"] = BEARConfig
DOMAIN_SETTINGS["bear"] = {
    "locomotion": {"mmd_kernel": "laplacian", "mmd_sigma": 20.0},
    # The policy itself; warm-up for a tenth of the run, as on D4RL.
    "bandit": {"vae_hidden_dim": 128, "warmup_steps": 2000, "action_candidates": 1},
}
TASK_SETTINGS["bear"] = {
    f"halfcheetah-{quality}-v2": {"mmd_kernel": "gaussian"}
    for quality in ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
}

# --- SfBC -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SfBCConfig(ValueConfig):
    """SfBC (Chen et al. 2023): utils.py, train_behavior.py and train_critic.py of its code (ChenDRAG/SfBC).

    Its epochs are passes over the data, 586,000 steps of the behaviour model and 244 per pass of Q's 199 passes, with
    new returns after 100; rounded here to thousands.
    """

    batch_size: int = 4096
    num_epochs: int = 50
    eval_interval: int = 5
    pretrain_epochs: int = setting(600, "epochs of the behaviour model before step 0", at_least=0, scales=True)
    learning_rate: float = setting(1e-4, "Adam's rate for the behaviour model", above=0)
    critic_learning_rate: float = 1e-3
    diffusion_steps: int = setting(15, "evaluations of the network per sample", above=0, alias="T")
    plan_interval: int = setting(25_000, "gradient steps between new returns of the whole dataset", above=0)
    plan_actions: int = setting(16, "actions per state of which V is made when returns are planned", above=0)
    alpha: float = setting(20.0, "inverse temperature of V's softmax", at_least=0)
    action_candidates: int = setting(32, "actions per state at evaluation, of which the critic chooses", above=0)
    select_alpha: float = setting(100.0, "inverse temperature of the choice among them", above=0)
    actions_averaged: int = setting(1, "how many of them are chosen and averaged", above=0, at_most="action_candidates")
    critic_layers: int = setting(
        2, "hidden layers of the critic: the last two are hidden_dim wide, any before them twice that", above=0
    )
    predict_data: bool = setting(
        False, "sample by integrating the predicted action, not the predicted noise; needed with few steps"
    )
    paper_planning: bool = setting(
        False, "plan R = r + discount max(R', V(s')) as the paper says, not max(r + discount R', V(s)) as its code does"
    )


CONFIGS["sfbc"] = SfBCConfig
DOMAIN_SETTINGS["sfbc"] = {
    "locomotion": {"actions_averaged": 4},
    "antmaze": {"num_epochs": 100, "eval_interval": 10, "plan_interval": 50_000},
    # T goes down to 5 there, where samples by the predicted noise fly apart.
    "bandit": {"pretrain_epochs": 20, "num_epochs": 5, "learning_rate": 1e-3, "predict_data": True},
}
TASK_SETTINGS["sfbc"] = {  # 512-256-256, its critic_type "large"
    "antmaze-large-play-v0": {"critic_layers": 3},
    "antmaze-large-diverse-v0": {"critic_layers": 3},
}

# --- IQL --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IQLConfig(ImplicitQConfig):
    """IQL (Kostrikov et al. 2022): expectile critics, a policy by advantage-weighted regression.

    From the official code's configs/ and train_offline.py; 10^6 steps, and 5,000 between its evaluations, for which
    this project keeps one interval for all algorithms.
    """

    beta: float = setting(3.0, "inverse temperature of the advantage weights", at_least=0)
    dropout: float = setting(0.0, "share of the policy's hidden units dropped in training", at_least=0, below=1)


CONFIGS["iql"] = IQLConfig
DOMAIN_SETTINGS["iql"] = {  # mujoco_config.py, antmaze_config.py and, for both others, kitchen_config.py of that code
    "locomotion": {"reward_tune": "iql_returns"},
    "antmaze": {"reward_tune": "iql_antmaze", "expectile": 0.9, "beta": 10.0},
    "adroit": {"beta": 0.5, "dropout": 0.1},
    "kitchen": {"beta": 0.5, "dropout": 0.1},
}

# --- CQL --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CQLConfig(CriticConfig):
    """CQL(H) (Kumar et al. 2020). The official code's README and d4rl/examples, where a row names no other source.

    The length is the paper's 10^6 steps; the example scripts go on to 3 * 10^6. Their `policy_eval_start` is 40,000,
    and their loop, which counts from 1, clones below it: `bc_steps` is one less.
    """

    learning_rate: float = setting(1e-4, "Adam's rate for the policy and its entropy's weight", above=0)
    min_q_weight: float = setting(5.0, "weight of the conservative term", at_least=0)
    target_action_gap: float = setting(-1.0, "where a multiplier holds the conservative term; below 0: no multiplier")
    max_q_backup: bool = setting(False, "take each critic's best of 10 next actions in the target")
    bc_steps: int = setting(39_999, "first steps, in which the policy clones the data", at_least=0, scales=True)


CONFIGS["cql"] = CQLConfig
DOMAIN_SETTINGS["cql"] = {
    # AntMaze: the official README; Adroit: the main branch of CORL (tinkoff-ai/CORL, configs/offline/cql/pen), for want
    # of official ones, without its state normalisation. Kitchen's are published nowhere: the defaults.
    "antmaze": {"reward_tune": "cql_antmaze", "target_action_gap": 5.0},
    "adroit": {"min_q_weight": 1.0, "bc_steps": 0},
    "bandit": {"bc_steps": 1000},  # the usual number is twice the run's length
}
TASK_SETTINGS["cql"] = {
    # 5 or 10, says the official README; which one where, d3rlpy's reproductions/offline/cql.py: 10 on the medium sets.
    "halfcheetah-medium-v2": {"min_q_weight": 10.0},
    "hopper-medium-v2": {"min_q_weight": 10.0},
    "walker2d-medium-v2": {"min_q_weight": 10.0},
}

# --- IDQL -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IDQLConfig(ImplicitQConfig, ChainConfig):
    """IDQL (Hansen-Estruch et al. 2023); launcher/examples/train_ddpm_iql_offline.py of philippe-eecs/IDQL.

    The last version of that code (7582571), whose author calls it faster and some 2 to 4 points weaker than the
    paper's (89bb493): `idql_version`. `action_candidates`, the paper's N, is 64 as in the launcher, which also tries
    16 and 256, the paper's also 32 and 128. Which one each of IDQL-A's scores took its code does not say. The published
    code acts by the best candidate (`greedy_action`).
    """

    idql_version: str = setting(
        "last",
        "version of the published code: last, or paper, which sets other defaults from batch_size to empty_step",
        one_of=("last", "paper"),
    )
    batch_size: int = setting(512, "transitions per gradient step of the diffusion model", above=0)
    critic_batch_size: int = setting(512, "rows of the batch, its first, that the critics take", above=0)
    num_epochs: int = 3000
    activation: str = setting("swish", "activation of the noise network: swish or mish", one_of=("swish", "mish"))
    time_frequencies: int = setting(64, "frequencies of the noise network's time features", above=0)
    weight_decay: float = setting(1e-4, "AdamW's weight decay of the noise network", at_least=0)
    value_norm: bool = setting(True, "a layer normalisation of the states before V")
    empty_step: bool = setting(False, "after the policy's step a second one with gradient zero: Adam's momentum alone")
    ema_decay: float = setting(0.999, "decay of the policy's average", at_least=0, at_most=1)
    dropout: float = setting(0.1, "share of the residual blocks' inputs dropped in training", at_least=0, below=1)
    residual_blocks: int = setting(3, "residual blocks of the noise network", above=0)
    action_candidates: int = setting(64, "actions per state at evaluation, of which the critics choose one", above=0)
    greedy_action: bool = setting(True, "act by the candidate of the greatest value; else by the implicit policy")


CONFIGS["idql"] = IDQLConfig
PRESETS["idql"] = {
    "idql_version": {
        "paper": {
            "batch_size": 2048,
            "critic_batch_size": 256,
            "num_epochs": 1500,
            "activation": "mish",
            "time_frequencies": 32,
            "weight_decay": 0.0,
            "value_norm": False,
            "empty_step": True,
        }
    }
}
DOMAIN_SETTINGS["idql"] = {  # the paper has locomotion and AntMaze
    "locomotion": {"reward_tune": "iql_returns"},
    "antmaze": {"reward_tune": "iql_antmaze", "expectile": 0.9},
}

# --- QGPO -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QGPOConfig(CriticConfig):
    """QGPO (Lu et al. 2023): utils.py, train_behavior.py, train_critic.py and the README's command of Offline_RL_2D in
    its code (ChenDRAG/CEP-energy-guided-diffusion).

    The code evaluates guidance scales from 0 to 10 (AntMaze: 1 to 4) and the paper chooses one per task; its table is
    not part of the code, so 1 stands here, the scale at which the sampled policy is the one that is derived. The code
    calls `beta` alpha, and `beta_q` q_alpha.
    """

    batch_size: int = setting(4096, "transitions per gradient step of the behaviour model", above=0)
    pretrain_epochs: int = setting(600, "epochs of the behaviour model before step 0", at_least=0, scales=True)
    critic_epochs: int = setting(500, "epochs from step 0 in which Q learns; the energy goes on", above=0)
    critic_batch_size: int = setting(256, "rows of the batch that Q and the energy take", above=0)
    learning_rate: float = setting(1e-4, "Adam's rate for the behaviour model", above=0)
    critic_learning_rate: float = setting(3e-4, "Adam's rate for Q and for the energy", above=0)
    diffusion_steps: int = setting(15, "evaluations of the networks per sample", above=0, alias="T")
    support_actions: int = setting(16, "samples of the behaviour model for every state of the data", above=0)
    beta: float = setting(3.0, "inverse temperature of the policy", at_least=0)
    beta_q: float = setting(3.0, "inverse temperature of the softmax in Q's target", at_least=0)
    guidance_scale: float = setting(1.0, "weight of the energy's gradient in sampling", at_least=0)


CONFIGS["qgpo"] = QGPOConfig
DOMAIN_SETTINGS["qgpo"] = {
    "locomotion": {"reward_tune": "return_range", "beta_q": 1.0},
    "antmaze": {"reward_tune": "iql_antmaze", "support_actions": 32},
    "bandit": {"pretrain_epochs": 20, "critic_epochs": 10, "learning_rate": 1e-3},
}

# --- Diffuser and Decision Diffuser -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlannerConfig(Config):
    """What algorithms that diffuse windows of a trajectory read."""

    size: str = setting(
        "published",
        "published, which needs a GPU, or small, which sets other defaults for two cores",
        one_of=("published", "small"),
    )
    batch_size: int = setting(64, "windows per gradient step", above=0)
    # An evaluation at the published size costs as much as many thousand gradient steps.
    eval_interval: int = setting(200, "epochs between evaluations", above=0)
    learning_rate: float = setting(2e-4, "Adam's rate", above=0)
    diffusion_steps: int = setting(20, "steps T of the diffusion chain", above=0, alias="T")
    horizon: int = setting(32, "steps of a window", above=1)
    hidden_dim: int = setting(32, "channels of the U-Net at full length", above=0)
    dim_mults: str = setting("1,2,4,8", "multiples of these, level by level; each but the last halves the length")
    discount: float = setting(0.997, "discount factor of the windows' returns", at_least=0, at_most=1)
    termination_penalty: float = setting(-100.0, "added to the reward of a terminal")
    ema_decay: float = setting(0.995, "decay of the networks' averages, which plan", at_least=0, at_most=1)
    ema_start: int = setting(2000, "gradient step from which they move; before it they are copies", at_least=0)
    ema_interval: int = setting(10, "gradient steps between their moves", above=0)


@dataclass(frozen=True, kw_only=True)
class DiffuserConfig(PlannerConfig):
    """Diffuser (Janner et al. 2022): config/locomotion.py of its code (jannerm/diffuser). Values are trained at the
    discount that planning loads, 0.997; that file's default is 0.99."""

    action_weight: float = setting(10.0, "weight of the first action's squared error", at_least=0)
    attention: bool = setting(False, "linear attention at every level of the U-Net")
    value_steps: int = setting(200_000, "first steps, in which the values are learnt too", above=0, scales=True)
    action_candidates: int = setting(
        64, "plans per state, of which the one with the largest value is followed", above=0
    )
    guide_scale: float = setting(0.1, "weight of the value's gradient", at_least=0)
    guide_steps: int = setting(2, "how often a plan is bent at every diffusion step", above=0, alias="n_guide_steps")
    guide_stop: int = setting(2, "diffusion steps below it are not bent", at_least=0, alias="t_stopgrad")
    guide_by_variance: bool = setting(True, "multiply the gradient by the posterior's variance")


CONFIGS["diffuser"] = DiffuserConfig
PRESETS["diffuser"] = {
    "size": {
        "small": {
            "num_epochs": 10, "eval_interval": 5, "value_steps": 10_000, "horizon": 8, "hidden_dim": 16,
            "dim_mults": "1,4", "diffusion_steps": 5, "action_candidates": 8, "guide_steps": 1, "guide_stop": 1,
        },
    },
}  # fmt: skip
TASK_SETTINGS["diffuser"] = {"hopper-medium-expert-v2": {"guide_scale": 1e-4, "guide_stop": 4}} | {
    f"halfcheetah-{quality}-v2": {
        "horizon": 4, "dim_mults": "1,4,8", "attention": True, "guide_scale": 1e-3, "guide_stop": 4,
    }
    for quality in ("medium", "medium-replay", "medium-expert", "random", "expert", "full-replay")
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecisionDiffuserConfig(PlannerConfig):
    """Decision Diffuser (Ajay et al. 2023): code/analysis/default_inv.py of its code (anuragajay/decision-diffuser).

    That is hopper-medium-expert's; other tasks have no published settings and take it, but for the returns' scale.
    """

    diffusion_steps: int = setting(200, "steps T of the diffusion chain", above=0, alias="T")
    horizon: int = 100
    hidden_dim: int = 128
    dim_mults: str = "1,4,8"
    discount: float = 0.99
    inverse_dim: int = setting(256, "width of the inverse dynamics' hidden layers", above=0)
    condition_dropout: float = setting(0.25, "share of rows whose return is not shown", at_least=0, below=1)
    guidance_weight: float = setting(1.2, "weight w of the guidance by the return", at_least=0)
    target_return: float = setting(0.9, "scaled return that plans should earn")
    returns_scale: float = setting(0.0, "what returns are divided by; 0: the data's largest return / 0.9", at_least=0)
    temperature: float = setting(0.5, "factor of the noise when sampling", at_least=0)


CONFIGS["decision_diffuser"] = DecisionDiffuserConfig
PRESETS["decision_diffuser"] = {
    "size": {
        "small": {
            "num_epochs": 10, "eval_interval": 5, "horizon": 16, "hidden_dim": 32, "dim_mults": "1,2",
            "diffusion_steps": 10,
        },
    },
}  # fmt: skip
TASK_SETTINGS["decision_diffuser"] = {"hopper-medium-expert-v2": {"returns_scale": 400.0}}

# Algorithms that have settings for some domains only.
_PLANNERS = "its settings were published for locomotion alone, and windows suit no other task here; take a locomotion "
_PLANNERS += "task such as hopper-medium-v2, or on this one diffcps, diffusion_ql, idql or iql"
ONLY_IN: dict[str, tuple[str, str]] = dict.fromkeys(("diffuser", "decision_diffuser"), ("locomotion", _PLANNERS))

# ======================================================================================================================
# Nothing to edit from here on.
# ======================================================================================================================

# The tasks that have settings. Where their files and environments are, utils/ knows; a test compares the names.
DOMAINS: dict[str, tuple[str, ...]] = {
    "locomotion": tuple(
        f"{robot}-{quality}-v2"
        for robot in ("halfcheetah", "hopper", "walker2d")
        for quality in ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
    ),
    "antmaze": tuple(
        f"antmaze-{maze}-v{version}"
        for version in (0, 2)
        for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
    ),
    "adroit": ("pen-human-v1", "pen-cloned-v1"),
    "kitchen": ("kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0"),
    "bandit": ("bandit-circle-v0", "bandit-gaussians-v0"),
}


def known_tasks() -> tuple[str, ...]:
    """Every task that has a domain: of D4RL's those that this project trains on, and the bandits."""
    return tuple(task for tasks in DOMAINS.values() for task in tasks)


def domain(env_name: str) -> str:
    """The domain of a task. Raises ValueError with the known tasks for an unknown one."""
    for name, tasks in DOMAINS.items():
        if env_name in tasks:
            return name
    raise ValueError(f"unknown task {env_name!r}; known: {', '.join(known_tasks())}")


def runs_on(algo: str, env_name: str) -> bool:
    """Whether the algorithm has settings for this task. Raises ValueError for an unknown task."""
    place = domain(env_name)
    return algo not in ONLY_IN or place == ONLY_IN[algo][0]


def settings(algo: str) -> dict[str, About]:
    """What is known of each of the algorithm's settings, in their order: the nearest class that says it."""
    if algo not in CONFIGS:
        raise ValueError(f"unknown algorithm {algo!r}; known: {', '.join(CONFIGS)}")
    return {field.name: _about(CONFIGS[algo], field.name) for field in dataclasses.fields(CONFIGS[algo])}


def _about(config: type[Config], name: str) -> About:
    for base in config.__mro__[:-1]:
        about = getattr(base, "__dataclass_fields__", {}).get(name)
        if about is not None and "about" in about.metadata:
            found: About = about.metadata["about"]
            return found
    raise TypeError(f"{config.__name__}.{name} has no help: write it as setting(default, help)")


def resolve(algo: str, env_name: str, overrides: Row | None = None) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """The settings of `algo` on a task as a frozen dataclass, and each one's value with where it came from: default,
    preset (`idql_version paper`, say), domain, task or command line.

    Raises ValueError for an unknown algorithm, task or setting (naming the known ones), a value of the wrong kind, or
    one that no run could use.
    """
    known = settings(algo)
    if not runs_on(algo, env_name):
        raise ValueError(f"{algo} does not run on {env_name}: {ONLY_IN[algo][1]}")
    defaults: Row = {field.name: field.default for field in dataclasses.fields(CONFIGS[algo])}
    found = {name: (value, "default") for name, value in defaults.items()}
    place = domain(env_name)
    sources = [
        (f"domain {place}", COMMON_SETTINGS.get(place, {})),
        (f"domain {place}", DOMAIN_SETTINGS.get(algo, {}).get(place, {})),
        (f"task {env_name}", _task_row(algo, env_name)),
        ("command line", overrides or {}),
    ]
    for name, presets in PRESETS.get(algo, {}).items():
        chosen = str(next((row[name] for _, row in reversed(sources) if name in row), defaults[name]))
        sources.insert(0, (f"{name} {chosen}", presets.get(chosen, {})))
    for origin, row in sources:
        for name, value in row.items():
            if name not in known:
                raise ValueError(f"unknown setting {name!r} for {algo}; known: {', '.join(known)}")
            found[name] = (_as_kind(name, value, type(defaults[name]), known[name].auto), origin)
    values = {name: value for name, (value, _) in found.items()}
    for name, about in known.items():
        _check(name, about, values)
    return CONFIGS[algo](**values), found


def explain(algo: str, env_name: str, overrides: Row | None = None) -> dict[str, tuple[Any, str]]:
    """Each setting's value and where it came from. Raises ValueError as `resolve` does."""
    return resolve(algo, env_name, overrides)[1]


def get(algo: str, env_name: str, **overrides: Any) -> Any:
    """The settings of `algo` on a task as a frozen dataclass. Raises ValueError as `resolve` does."""
    return resolve(algo, env_name, overrides)[0]


def _task_row(algo: str, env_name: str) -> Row:
    """The task's own row; AntMaze's v2 ids use the v0 settings (the paper names no version, its code uses v0)."""
    rows = TASK_SETTINGS.get(algo, {})
    if env_name not in rows and env_name.startswith("antmaze") and env_name.endswith("-v2"):
        env_name = env_name.removesuffix("2") + "0"
    return rows.get(env_name, {})


AUTO = "auto"  # the word that may stand for a number where `About.auto` says so
_KINDS: dict[type, type] = {float: numbers.Real, int: numbers.Integral}
_LIMITS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def _as_kind(name: str, value: Any, wanted: type, auto: bool) -> Any:
    """`value` as the default's type: any integer for a float or an int, any real for a float, NumPy's too."""
    if auto and value == AUTO:
        return AUTO
    if not isinstance(value, _KINDS.get(wanted, wanted)) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} must be {wanted.__name__}, not {value!r}")
    return wanted(value)


def _check(name: str, about: About, values: Row) -> None:
    """Raises ValueError for a value that no run could use."""
    value = values[name]
    if value != value:
        raise ValueError(f"{name} must be a number, not NaN")
    if about.one_of and value not in about.one_of:
        raise ValueError(f"{name} must be {' or '.join(about.one_of)}, not {value!r}")
    if about.excludes and value and values[about.excludes]:
        raise ValueError(f"{about.excludes} and {name} exclude each other; choose one")
    for words, holds in _LIMITS.items():
        limit = getattr(about, words)
        bound = values[limit] if isinstance(limit, str) else limit
        if bound is not None and value != AUTO and not holds(value, bound):
            shown = f"{limit} ({bound})" if isinstance(limit, str) else bound
            raise ValueError(f"{name} must be {words.replace('_', ' ')} {shown}, not {value}")
