"""Every setting, once: default < domain < task < command line.

Edit the tables below for your own studies, or pass a flag of the same name. The numbers are those of each algorithm's
published code, which its class names; without a name it is DiffCPS's (github.com/felix-thu/DiffCPS, from which Table 3
of the paper is made) or, for Diffusion-QL and DTQL, their authors'. A value that holds for a whole domain stands in the
domain's row and nowhere else. This file imports nothing of the project.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CONFIGS",
    "AWRConfig",
    "BCConfig",
    "BCQConfig",
    "BEARConfig",
    "CQLConfig",
    "Config",
    "DTQLConfig",
    "DiffCPSConfig",
    "DiffusionBCConfig",
    "DiffusionQLConfig",
    "IDQLConfig",
    "IQLConfig",
    "QGPOConfig",
    "SfBCConfig",
    "TD3BCConfig",
    "domain",
    "explain",
    "get",
    "known_tasks",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every algorithm reads: the data, the length of a run, evaluation, and the shared optimiser settings."""

    reward_tune: str = (
        "no"  # see utils/data/dataset.py: no | normalize | iql_locomotion | iql_returns | iql_antmaze | ...
    )
    batch_size: int = 256
    num_epochs: int = 2000
    num_steps_per_epoch: int = 1000
    eval_interval: int = 50  # epochs between evaluations
    eval_episodes: int = 10
    learning_rate: float = 3e-4
    lr_decay: bool = False  # as published: ends at 0.999 of the start (DTQL's is stepped every update and ends at zero)
    lr_decay_full: bool = False  # a cosine that ends at zero
    grad_norm: float = 1.0  # every network's gradient is clipped at this norm; 0: no clipping
    hidden_dim: int = 256  # width of the networks' hidden layers


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Config):
    """What every algorithm with critics reads."""

    action_candidates: int = 50  # actions a state at evaluation, one drawn by softmax of the critics' minimum
    critic_learning_rate: float = 3e-4  # the published code has one for all tasks, whatever the policy's is
    discount: float = 0.99
    tau: float = 0.005  # rate of the target critics' average
    ema_decay: float = 0.995  # decay of the policy's average
    ema_start: int = 1000  # first gradient step at which that average moves
    ema_interval: int = 5


@dataclass(frozen=True, kw_only=True)
class ChainConfig(Config):
    """What every policy with a variance-preserving diffusion chain reads."""

    diffusion_steps: int = 5
    beta_schedule: str = "vp"  # vp | linear | cosine


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(CriticConfig, ChainConfig):
    """A diffusion chain that is improved by critics."""

    max_q_backup: bool = False  # best of 10 next actions in the critics' target


@dataclass(frozen=True, kw_only=True)
class DiffCPSConfig(DiffusionConfig):
    """DiffCPS: the constraint and its multiplier lambda."""

    kappa: float = 0.06  # bound of the denoising loss; the published command calls it target_kl
    lambda_init: float = 1.0
    lambda_min: float = 0.0
    lambda_max: float = 100.0
    lambda_learning_rate: float = 3e-5
    lambda_anti_windup: bool = False  # clamp the stored lambda too, not only the used one
    policy_interval: int = 2  # policy and lambda move every so many steps


@dataclass(frozen=True, kw_only=True)
class DiffusionQLConfig(DiffusionConfig):
    """Diffusion-QL: the denoising loss plus eta times the Q term."""

    eta: float = 1.0
    top_k: int = 1  # offline selection: the evaluation with this rank in bc_loss, 0 the smallest


@dataclass(frozen=True, kw_only=True)
class DiffusionBCConfig(ChainConfig):
    """Diffusion behaviour cloning: the denoising loss alone."""

    grad_norm: float = 0.0  # the published code clips nothing here
    top_k: int = 1  # offline selection, as for Diffusion-QL


@dataclass(frozen=True, kw_only=True)
class DTQLConfig(CriticConfig):
    """DTQL: a behaviour policy, and a one-step policy held near it by the trust-region loss."""

    num_epochs: int = 1000  # after the pretraining
    grad_norm: float = 0.0  # the published code clips nothing here
    action_candidates: int = 1024
    pretrain_epochs: int = 50  # behaviour policy and critics alone, before gradient step 0
    alpha: float = 5.0  # weight of the trust-region loss
    gamma: float = 0.0  # weight of the one-step policy's negative log-likelihood of the data
    expectile: float = 0.7
    sigma_min: float = 0.002  # noise levels are log-logistic around sigma_data, between these
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # deviation of the data in the network's preconditioning
    clip_denoised: float = 1.0  # bound of denoised actions; the published code has 1 whatever the action box


@dataclass(frozen=True, kw_only=True)
class BCConfig(Config):
    """Behaviour cloning with a Gaussian; length and network of TD3+BC's code (sfujim/TD3_BC), whose table has it."""

    num_epochs: int = 1000
    grad_norm: float = 0.0  # nothing is clipped
    sample_actions: bool = False  # act by a sample of the policy; else by its mean


@dataclass(frozen=True, kw_only=True)
class AWRConfig(Config):
    """AWR (Peng et al. 2019): awr_configs.py and learning/awr_agent.py of its code (xbpeng/awr); rates are Adam's."""

    num_epochs: int = 1000
    grad_norm: float = 0.0  # the published code clips nothing
    critic_learning_rate: float = 3e-4
    discount: float = 0.99
    td_lambda: float = 0.95
    temperature: float = 1.0  # the paper's beta, of advantages that are normalised over the data
    weight_max: float = 20.0
    plan_interval: int = 1000  # steps between new returns and weights: the policy's steps an iteration
    action_std: float = 0.4  # of the policy, in units of the action box
    sample_actions: bool = False  # act by a sample of the policy; else by its mean


@dataclass(frozen=True, kw_only=True)
class TD3BCConfig(Config):
    """TD3+BC (Fujimoto & Gu 2021): main.py of its code (sfujim/TD3_BC) has one set of settings for all tasks."""

    num_epochs: int = 1000
    grad_norm: float = 0.0  # the published code clips nothing
    critic_learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005  # rate of the targets' averages, which move with the policy
    policy_interval: int = 2  # policy and targets move every so many steps
    target_noise: float = 0.2  # deviation of the noise on the target policy's action, in units of the action box
    target_noise_clip: float = 0.5  # its bound, in the same units
    alpha: float = 2.5  # weight of the Q term, which is divided by mean |Q|
    normalize_states: bool = True


@dataclass(frozen=True, kw_only=True)
class BCQConfig(Config):
    """BCQ (Fujimoto et al. 2019): continuous_BCQ/ of its code (sfujim/BCQ) has one set of settings for all tasks."""

    batch_size: int = 100
    num_epochs: int = 1000
    learning_rate: float = 1e-3  # of the perturbation
    grad_norm: float = 0.0  # the published code clips nothing
    hidden_dim: int = 400  # the second layer has three quarters of it: 400 and 300 as published
    vae_hidden_dim: int = 750
    vae_learning_rate: float = 1e-3
    critic_learning_rate: float = 1e-3
    discount: float = 0.99
    tau: float = 0.005  # rate of the targets' averages
    phi: float = 0.05  # largest perturbation, in units of the action box
    min_weight: float = 0.75  # of the critics' minimum in the target, the rest of their maximum; the paper's lambda
    action_candidates: int = 100


@dataclass(frozen=True, kw_only=True)
class BEARConfig(Config):
    """BEAR (Kumar et al. 2019) as its authors tuned it for D4RL: bear/examples/bear_hdf5_d4rl.py of D4RL-Evaluations.

    That code (rail-berkeley/d4rl_evaluations, to which the original, aviralkumar2907/BEAR, points) has one set of
    settings for all tasks. Its example runs 3,000 epochs; the length here is that of the other classic methods.
    """

    num_epochs: int = 1000
    learning_rate: float = 1e-4  # of the policy
    grad_norm: float = 0.0  # the published code clips nothing
    vae_hidden_dim: int = 750
    vae_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    alpha_learning_rate: float = 1e-3  # of the multiplier
    discount: float = 0.99
    tau: float = 0.005  # rate of the target critics' average
    min_weight: float = 0.75  # of the critics' minimum in the target, the rest of their maximum
    mmd_kernel: str = "gaussian"  # gaussian | laplacian
    mmd_sigma: float = 50.0
    mmd_samples: int = 4  # actions a state of the policy and of the behaviour model
    mmd_threshold: float = 0.05  # the bound epsilon
    warmup_steps: int = 40_000  # before the policy seeks value; until then it only follows the behaviour model
    action_candidates: int = 100


@dataclass(frozen=True, kw_only=True)
class SfBCConfig(Config):
    """SfBC (Chen et al. 2023): utils.py, train_behavior.py and train_critic.py of its code (ChenDRAG/SfBC).

    Its epochs are passes over the data, 586,000 steps of the behaviour model and 244 a pass of Q's 199 passes, with
    new returns after 100; rounded here to thousands.
    """

    batch_size: int = 4096
    num_epochs: int = 50
    eval_interval: int = 5
    pretrain_epochs: int = 600  # of the behaviour model, before gradient step 0
    learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    grad_norm: float = 0.0  # the published code clips nothing
    discount: float = 0.99
    diffusion_steps: int = 15  # evaluations of the network a sample
    plan_interval: int = 25_000  # steps of Q between planned returns
    plan_actions: int = 16  # candidates of V
    alpha: float = 20.0  # inverse temperature of V's softmax
    action_candidates: int = 32
    select_alpha: float = 100.0  # inverse temperature of the choice among them
    actions_averaged: int = 1
    critic_layers: int = 2


@dataclass(frozen=True, kw_only=True)
class ImplicitQConfig(Config):
    """What every algorithm with implicit Q-learning's critics reads; ikostrikov/implicit_q_learning, configs/."""

    lr_decay: bool = True  # the policy's rate alone, by a cosine stepped at every update, ending at zero
    grad_norm: float = 0.0  # the published code clips nothing
    critic_learning_rate: float = 3e-4  # of Q and V
    discount: float = 0.99
    tau: float = 0.005  # rate of the target critics' average
    expectile: float = 0.7


@dataclass(frozen=True, kw_only=True)
class IQLConfig(ImplicitQConfig):
    """IQL (Kostrikov et al. 2022): expectile critics, a policy by advantage-weighted regression.

    From the official code's configs/ and train_offline.py; 10^6 steps, and 5,000 between its evaluations, for which
    this project keeps one interval for all algorithms.
    """

    num_epochs: int = 1000
    beta: float = 3.0  # inverse temperature of the advantage weights
    dropout: float = 0.0  # of the policy's hidden layers


@dataclass(frozen=True, kw_only=True)
class CQLConfig(Config):
    """CQL(H) (Kumar et al. 2020). The official code's README and d4rl/examples, where a row names no other source."""

    num_epochs: int = 1000  # the paper's 10^6 steps; the example scripts go on to 3 * 10^6
    learning_rate: float = 1e-4  # of the policy and its entropy's weight
    grad_norm: float = 0.0  # nothing is clipped
    critic_learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005  # rate of the target critics' average
    min_q_weight: float = 5.0  # of the conservative term
    target_action_gap: float = -1.0  # what a Lagrange multiplier holds that term at; below 0: no multiplier
    max_q_backup: bool = False  # each critic's best of 10 next actions in the target
    bc_steps: int = 40_000  # steps from the start at which the policy clones the data (`policy_eval_start`)


@dataclass(frozen=True, kw_only=True)
class IDQLConfig(ImplicitQConfig, ChainConfig):
    """IDQL (Hansen-Estruch et al. 2023); launcher/examples/train_ddpm_iql_offline.py of philippe-eecs/IDQL.

    Batch and length are those of its last version (7582571), whose author calls it faster and some 2 to 4 points
    weaker than the paper's, which took 2,048 rows for the policy. `action_candidates`, the paper's N, is 64 as in
    the launcher, which also tries 16, 32, 128 and 256. Which one each of IDQL-A's scores took its code does not say.
    """

    batch_size: int = 512  # of the diffusion model
    critic_batch_size: int = 256  # the first rows of the same batch
    num_epochs: int = 3000
    ema_decay: float = 0.999  # decay of the policy's average
    dropout: float = 0.1  # at the residual blocks' inputs
    residual_blocks: int = 3
    action_candidates: int = 64
    greedy_action: bool = True  # act by the best candidate, as published; else by the implicit policy


@dataclass(frozen=True, kw_only=True)
class QGPOConfig(Config):
    """QGPO (Lu et al. 2023): utils.py, train_behavior.py, train_critic.py and the README's command of Offline_RL_2D in
    its code (ChenDRAG/CEP-energy-guided-diffusion).

    The code evaluates guidance scales from 0 to 10 (AntMaze: 1 to 4) and the paper chooses one a task; its table is not
    part of the code, so 1 stands here, the scale at which the sampled policy is the one that is derived.
    """

    batch_size: int = 4096  # of the behaviour model
    num_epochs: int = 1000
    pretrain_epochs: int = 600  # of the behaviour model, before gradient step 0
    critic_epochs: int = 500  # of Q, which then stands still while the energy goes on
    critic_batch_size: int = 256  # of Q and the energy
    learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4  # of Q and of the energy
    grad_norm: float = 0.0  # the published code clips nothing
    discount: float = 0.99
    tau: float = 0.005  # rate of the target critics' average
    diffusion_steps: int = 15  # evaluations of the networks a sample
    support_actions: int = 16
    beta: float = 3.0  # inverse temperature of the policy: the code's alpha
    beta_q: float = 3.0  # inverse temperature of the softmax in Q's target: the code's q_alpha
    guidance_scale: float = 1.0


CONFIGS: dict[str, type[Config]] = {
    "diffcps": DiffCPSConfig,
    "diffusion_ql": DiffusionQLConfig,
    "diffusion_bc": DiffusionBCConfig,
    "dtql": DTQLConfig,
    "bc": BCConfig,
    "awr": AWRConfig,
    "td3_bc": TD3BCConfig,
    "bcq": BCQConfig,
    "bear": BEARConfig,
    "sfbc": SfBCConfig,
    "iql": IQLConfig,
    "cql": CQLConfig,
    "idql": IDQLConfig,
    "qgpo": QGPOConfig,
}

Row = dict[str, Any]

# --- Domains --------------------------------------------------------------------------------------

LOCOMOTION = tuple(
    f"{robot}-{quality}-v2"
    for robot in ("halfcheetah", "hopper", "walker2d")
    for quality in ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
)
ANTMAZE = tuple(
    f"antmaze-{maze}-v{version}"
    for version in (0, 2)
    for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
)

ADROIT = ("pen-human-v1", "pen-cloned-v1")
KITCHEN = ("kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0")
BANDIT = ("bandit-circle-v0", "bandit-gaussians-v0")  # the toy problems of utils/data/bandit.py

DOMAINS: dict[str, tuple[str, ...]] = {
    "locomotion": LOCOMOTION,
    "antmaze": ANTMAZE,
    "adroit": ADROIT,
    "kitchen": KITCHEN,
    "bandit": BANDIT,
}

# What holds in a domain for every algorithm; an algorithm's own row goes before it.
COMMON_SETTINGS: dict[str, Row] = {
    # 20,000 steps are the paper's. Diffusion-QL's toy code has a width of 128 and batches of 100; these take about a
    # quarter of the time, so that all methods of the toy experiment, T up to 20, train on two cores in 40 minutes. The
    # rows of policies that denoise have a rate of 1e-3: with 3e-4 a clone of the circle (T = 20, batches of 64) earns
    # 48 percent after 10,000 steps and 97 after 20,000, with 1e-3 it earns 97 from 10,000 on.
    "bandit": {"num_epochs": 20, "eval_interval": 5, "eval_episodes": 100, "batch_size": 32, "hidden_dim": 64},
}

DOMAIN_SETTINGS: dict[str, dict[str, Row]] = {
    "diffcps": {
        "locomotion": {},
        "antmaze": {
            "reward_tune": "cql_antmaze",
            "num_epochs": 1000,
            "eval_episodes": 100,
            "max_q_backup": True,
            "lambda_min": 0.3,
            "kappa": 0.2,
        },
        # One candidate: the policy itself, as Diffusion-QL's toy code draws it.
        "bandit": {"action_candidates": 1, "learning_rate": 1e-3},
    },
    "diffusion_ql": {
        "antmaze": {
            "reward_tune": "cql_antmaze",
            "num_epochs": 1000,
            "eval_episodes": 100,
            "max_q_backup": True,
        },
        "adroit": {
            "reward_tune": "normalize",
            "num_epochs": 1000,
            "eval_episodes": 100,
            "learning_rate": 3e-5,
            "top_k": 2,
        },
        "kitchen": {"num_epochs": 1000, "eval_episodes": 100, "eta": 0.005, "top_k": 2},
        "bandit": {"action_candidates": 1, "learning_rate": 1e-3},
    },
    "dtql": {
        "antmaze": {
            "reward_tune": "iql_antmaze",
            "batch_size": 2048,
            "eval_episodes": 100,
            "alpha": 1.0,
            "gamma": 1.0,
            "expectile": 0.9,
        },
        "adroit": {"eval_episodes": 100, "alpha": 1500.0},
        "kitchen": {"num_epochs": 500, "eval_episodes": 100, "alpha": 200.0, "lr_decay": True},
        "bandit": {"pretrain_epochs": 5, "action_candidates": 1, "learning_rate": 1e-3},
    },
    "bc": {
        "antmaze": {"eval_episodes": 100},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
        "bandit": {"sample_actions": True},  # the figures show a policy's distribution
    },
    "awr": {
        "antmaze": {"eval_episodes": 100, "action_std": 0.2},  # the deviation of the published Ant
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
        "bandit": {"sample_actions": True},  # the figures show a policy's distribution
    },
    "td3_bc": {
        # The paper has locomotion alone. AntMaze's rewards as CORL's configs/offline/td3_bc/antmaze have them.
        "antmaze": {"reward_tune": "iql_antmaze", "eval_episodes": 100},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
    },
    "bcq": {  # D4RL's evaluation (Fu et al. 2020) has the same settings and the data's own rewards everywhere
        "antmaze": {"eval_episodes": 100},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
        "bandit": {"vae_hidden_dim": 128, "action_candidates": 1},  # a policy's distribution, not its Q's highest point
    },
    "bear": {
        "antmaze": {"eval_episodes": 100},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
        # The policy itself; warm-up for a tenth of the run, as on D4RL.
        "bandit": {"vae_hidden_dim": 128, "warmup_steps": 2000, "action_candidates": 1},
    },
    "sfbc": {
        "locomotion": {"actions_averaged": 4},
        "antmaze": {"num_epochs": 100, "eval_interval": 10, "eval_episodes": 100, "plan_interval": 50_000},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
        "bandit": {"pretrain_epochs": 20, "num_epochs": 5, "learning_rate": 1e-3},
    },
    "iql": {  # mujoco_config.py, antmaze_config.py and, for both others, kitchen_config.py of the official code
        "locomotion": {"reward_tune": "iql_returns"},
        "antmaze": {"reward_tune": "iql_antmaze", "eval_episodes": 100, "expectile": 0.9, "beta": 10.0},
        "adroit": {"eval_episodes": 100, "beta": 0.5, "dropout": 0.1},
        "kitchen": {"eval_episodes": 100, "beta": 0.5, "dropout": 0.1},
    },
    "cql": {  # AntMaze: the official README; Adroit: CORL (tinkoff-ai/CORL, configs/offline/cql/pen), for want of
        # official ones, without its state normalisation. Kitchen's are published nowhere: the defaults.
        "antmaze": {"reward_tune": "cql_antmaze", "eval_episodes": 100, "target_action_gap": 5.0},
        "adroit": {"eval_episodes": 100, "learning_rate": 3e-5, "min_q_weight": 1.0, "target_action_gap": 5.0},
        "kitchen": {"eval_episodes": 100},
        "bandit": {"bc_steps": 1000},  # the usual number is twice the run's length
    },
    "idql": {  # the paper has locomotion and AntMaze
        "locomotion": {"reward_tune": "iql_returns"},
        "antmaze": {"reward_tune": "iql_antmaze", "eval_episodes": 100, "expectile": 0.9},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
    },
    "qgpo": {
        "locomotion": {"reward_tune": "iql_returns", "beta_q": 1.0},
        "antmaze": {"reward_tune": "iql_antmaze", "support_actions": 32, "eval_episodes": 100},
        "adroit": {"eval_episodes": 100},
        "kitchen": {"eval_episodes": 100},
        "bandit": {"pretrain_epochs": 20, "critic_epochs": 10, "learning_rate": 1e-3},
    },
}

# --- Tasks ----------------------------------------------------------------------------------------

TASK_SETTINGS: dict[str, dict[str, Row]] = {
    "diffcps": {
        "halfcheetah-medium-v2": {"kappa": 0.06, "grad_norm": 9.0},
        "hopper-medium-v2": {"kappa": 0.05, "grad_norm": 9.0},
        "walker2d-medium-v2": {"kappa": 0.03, "grad_norm": 1.0},
        "halfcheetah-medium-replay-v2": {"kappa": 0.06, "grad_norm": 2.0},
        "hopper-medium-replay-v2": {"kappa": 0.03, "grad_norm": 4.0},
        "walker2d-medium-replay-v2": {"kappa": 0.03, "grad_norm": 4.0},
        "halfcheetah-medium-expert-v2": {"kappa": 0.04, "grad_norm": 7.0},
        "hopper-medium-expert-v2": {"kappa": 0.03, "grad_norm": 5.0},
        "walker2d-medium-expert-v2": {"kappa": 0.04, "grad_norm": 5.0},
        "antmaze-umaze-v0": {"lambda_init": 3.0, "grad_norm": 2.0, "max_q_backup": False},
        "antmaze-umaze-diverse-v0": {"lambda_init": 3.0, "grad_norm": 3.0, "kappa": 0.09},
        "antmaze-medium-play-v0": {"learning_rate": 1e-3, "grad_norm": 2.0, "kappa": 0.3},
        "antmaze-medium-diverse-v0": {"grad_norm": 1.0},
        "antmaze-large-play-v0": {"lambda_init": 0.5, "grad_norm": 10.0, "policy_interval": 4},
        "antmaze-large-diverse-v0": {"lambda_init": 0.5, "grad_norm": 7.0, "policy_interval": 4},
    },
    "diffusion_ql": {
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
    },
    "dtql": {
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
    },
    "sfbc": {"antmaze-large-play-v0": {"critic_layers": 3}, "antmaze-large-diverse-v0": {"critic_layers": 3}},
}


# 5 or 10, says the official README; which one where, d3rlpy's reproductions/offline/cql.py: 10 on the medium sets.
TASK_SETTINGS["cql"] = {f"{robot}-medium-v2": {"min_q_weight": 10.0} for robot in ("halfcheetah", "hopper", "walker2d")}


def _without_critics(rows: dict[str, Row]) -> dict[str, Row]:
    """Diffusion-QL's rows as far as behaviour cloning reads them: the published code has one table for both."""
    unread = ("eta", "grad_norm", "max_q_backup", "action_candidates")
    return {name: {k: v for k, v in row.items() if k not in unread} for name, row in rows.items()}


DOMAIN_SETTINGS["diffusion_bc"] = _without_critics(DOMAIN_SETTINGS["diffusion_ql"])
TASK_SETTINGS["diffusion_bc"] = _without_critics(TASK_SETTINGS["diffusion_ql"])

PAPER_TASKS: tuple[str, ...] = tuple(TASK_SETTINGS["diffcps"])  # the 15 rows of Table 1


# --- Looking up -----------------------------------------------------------------------------------


def known_tasks() -> tuple[str, ...]:
    """Every task name that has a domain."""
    return tuple(task for tasks in DOMAINS.values() for task in tasks)


def domain(env_name: str) -> str:
    """The domain of a task. Raises ValueError with the known tasks for an unknown one."""
    for name, tasks in DOMAINS.items():
        if env_name in tasks:
            return name
    raise ValueError(f"unknown task {env_name!r}; known: {', '.join(known_tasks())}")


def _task_row(algo: str, env_name: str) -> Row:
    """The task's own row; AntMaze's v2 ids use the v0 settings (the paper names no version, its code uses v0)."""
    rows = TASK_SETTINGS.get(algo, {})
    if env_name not in rows and env_name.startswith("antmaze") and env_name.endswith("-v2"):
        env_name = env_name.removesuffix("2") + "0"
    return rows.get(env_name, {})


def explain(algo: str, env_name: str, overrides: Row | None = None) -> dict[str, tuple[Any, str]]:
    """Each setting's value and where it came from: default, domain, task or command line.

    Raises ValueError for an unknown algorithm, task or setting (naming the known ones) or a value of the wrong kind.
    """
    if algo not in CONFIGS:
        raise ValueError(f"unknown algorithm {algo!r}; known: {', '.join(CONFIGS)}")
    fields = {f.name: f for f in dataclasses.fields(CONFIGS[algo])}
    found = {name: (field.default, "default") for name, field in fields.items()}
    sources = (
        (f"domain {domain(env_name)}", COMMON_SETTINGS.get(domain(env_name), {})),
        (f"domain {domain(env_name)}", DOMAIN_SETTINGS.get(algo, {}).get(domain(env_name), {})),
        (f"task {env_name}", _task_row(algo, env_name)),
        ("command line", overrides or {}),
    )
    for origin, row in sources:
        for name, value in row.items():
            if name not in fields:
                raise ValueError(f"unknown setting {name!r} for {algo}; known: {', '.join(fields)}")
            found[name] = (_checked(name, value, fields[name].default), origin)
    return found


def resolve(algo: str, env_name: str, overrides: Row | None = None) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """The settings of `algo` on a task as a frozen dataclass, and what `explain` says. Raises ValueError as it does."""
    settings = explain(algo, env_name, overrides)
    config = CONFIGS[algo](**{name: value for name, (value, _) in settings.items()})
    _check_ranges(config)
    return config, settings


def get(algo: str, env_name: str, **overrides: Any) -> Any:
    """The settings of `algo` on a task as a frozen dataclass. Raises ValueError as `explain` does."""
    return resolve(algo, env_name, overrides)[0]


def _checked(name: str, value: Any, default: Any) -> Any:
    """`value` as the default's type: any integer for a float or an int, any real for a float, NumPy's too."""
    wanted = type(default)
    kinds = {float: numbers.Real, int: numbers.Integral}.get(wanted, wanted)
    if not isinstance(value, kinds) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} must be {wanted.__name__}, not {value!r}")
    return wanted(value)


POSITIVE = (
    "batch_size", "num_epochs", "num_steps_per_epoch", "eval_interval", "eval_episodes", "action_candidates",
    "learning_rate", "critic_learning_rate", "lambda_learning_rate", "diffusion_steps", "policy_interval",
    "support_actions", "critic_epochs",
    "plan_actions", "select_alpha", "actions_averaged", "critic_layers",
    "temperature", "weight_max", "plan_interval", "action_std",
    "hidden_dim", "ema_interval", "sigma_min", "sigma_max", "sigma_data", "clip_denoised",
    "vae_hidden_dim", "vae_learning_rate", "alpha_learning_rate", "mmd_sigma", "mmd_samples",
    "critic_batch_size", "residual_blocks",
)  # fmt: skip
FRACTIONS = ("discount", "tau", "td_lambda", "ema_decay", "expectile", "dropout", "min_weight")
NOT_NEGATIVE = (
    "grad_norm", "kappa", "lambda_min", "ema_start", "eta", "top_k", "alpha", "gamma", "pretrain_epochs",
    "beta", "beta_q", "guidance_scale", "target_noise", "target_noise_clip", "phi",
    "min_q_weight", "bc_steps",
    "mmd_threshold", "warmup_steps",
)  # fmt: skip


def _check_ranges(config: Config) -> None:
    """Raises ValueError for a value that no run could use."""
    values = dataclasses.asdict(config)
    for name, value in values.items():
        if isinstance(value, float) and value != value:
            raise ValueError(f"{name} must be a number, not NaN")
        if name in POSITIVE and not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
        if name in FRACTIONS and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {value}")
        if name in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    if "lambda_min" in values and values["lambda_min"] > values["lambda_max"]:
        raise ValueError(f"lambda_min ({values['lambda_min']}) is above lambda_max ({values['lambda_max']})")
    if values.get("actions_averaged", 0) > values.get("action_candidates", 0):
        few, many = values["actions_averaged"], values["action_candidates"]
        raise ValueError(f"actions_averaged ({few}) is above action_candidates ({many})")
    if "sigma_min" in values and values["sigma_min"] >= values["sigma_max"]:
        raise ValueError(f"sigma_min ({values['sigma_min']}) must be below sigma_max ({values['sigma_max']})")
    if values.get("mmd_kernel", "gaussian") not in ("gaussian", "laplacian"):
        raise ValueError(f"mmd_kernel must be gaussian or laplacian, not {values['mmd_kernel']!r}")
    if values.get("dropout") == 1:
        raise ValueError("dropout must be below 1: it would drop everything")
    if values["lr_decay"] and values["lr_decay_full"]:
        raise ValueError("lr_decay and lr_decay_full exclude each other; choose one")
