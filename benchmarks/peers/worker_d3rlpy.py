"""d3rlpy's side of `benchmarks.peers`: runs in an environment of its own, knows nothing of this project.

One JSON object per line. In: the settings of one algorithm, then `{"steps": n}` as often as wanted. Out: the versions,
then the seconds that n steps took: `update` of the algorithm's update alone, `loop` with the sampling of its batches.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

EPISODE = 1000  # transitions in a trajectory
Settings = dict[str, Any]


def encoder(*widths: int) -> Any:
    from d3rlpy.models.encoders import VectorEncoderFactory

    return VectorEncoderFactory(hidden_units=list(widths))


def actor_critic(s: Settings, *widths: int) -> Settings:
    """What all algorithms with an actor and two critics take."""
    return {
        "actor_learning_rate": s["learning_rate"],
        "critic_learning_rate": s["critic_learning_rate"],
        "actor_encoder_factory": encoder(*widths),
        "critic_encoder_factory": encoder(*widths),
        "gamma": s["discount"],
        "tau": s["tau"],
    }


def bc(s: Settings) -> Any:
    from d3rlpy.algos import BCConfig

    widths = encoder(s["hidden_dim"], s["hidden_dim"])
    return BCConfig(policy_type="stochastic", learning_rate=s["learning_rate"], encoder_factory=widths,
                    batch_size=s["batch_size"], compile_graph=s["compile_graph"])  # fmt: skip


def td3_bc(s: Settings) -> Any:
    from d3rlpy.algos import TD3PlusBCConfig

    return TD3PlusBCConfig(**actor_critic(s, *[s["hidden_dim"]] * 2), update_actor_interval=s["policy_interval"],
                           target_smoothing_sigma=s["target_noise"], target_smoothing_clip=s["target_noise_clip"],
                           alpha=s["alpha"], batch_size=s["batch_size"],
                           compile_graph=s["compile_graph"])  # fmt: skip


def iql(s: Settings) -> Any:
    from d3rlpy.algos import IQLConfig

    widths = [s["hidden_dim"]] * 2
    return IQLConfig(**actor_critic(s, *widths), value_encoder_factory=encoder(*widths), expectile=s["expectile"],
                     weight_temp=s["beta"], batch_size=s["batch_size"],
                     compile_graph=s["compile_graph"])  # fmt: skip


def cql(s: Settings) -> Any:
    from d3rlpy.algos import CQLConfig

    fixed = s["target_action_gap"] < 0
    return CQLConfig(**actor_critic(s, *[s["hidden_dim"]] * 3), temp_learning_rate=s["learning_rate"],
                     alpha_learning_rate=0.0 if fixed else s["critic_learning_rate"],
                     conservative_weight=s["min_q_weight"], n_action_samples=s["samples"],
                     max_q_backup=s["max_q_backup"], batch_size=s["batch_size"],
                     compile_graph=s["compile_graph"])  # fmt: skip


def bcq(s: Settings) -> Any:
    from d3rlpy.algos import BCQConfig

    widths, codes = (s["hidden_dim"], 3 * s["hidden_dim"] // 4), [s["vae_hidden_dim"]] * 2
    return BCQConfig(**actor_critic(s, *widths), imitator_encoder_factory=encoder(*codes), lam=s["min_weight"],
                     imitator_learning_rate=s["vae_learning_rate"], action_flexibility=s["phi"],
                     n_action_samples=s["samples"], batch_size=s["batch_size"],
                     compile_graph=s["compile_graph"])  # fmt: skip


def bear(s: Settings) -> Any:
    from d3rlpy.algos import BEARConfig

    widths, codes = [s["hidden_dim"]] * 2, [s["vae_hidden_dim"]] * 2
    return BEARConfig(**actor_critic(s, *widths), imitator_encoder_factory=encoder(*codes), lam=s["min_weight"],
                      imitator_learning_rate=s["vae_learning_rate"], alpha_threshold=s["mmd_threshold"],
                      mmd_kernel=s["mmd_kernel"], mmd_sigma=s["mmd_sigma"], n_mmd_action_samples=s["mmd_samples"],
                      n_target_samples=s["samples"], warmup_steps=0, batch_size=s["batch_size"],
                      compile_graph=s["compile_graph"])  # fmt: skip


ALGORITHMS: dict[str, Callable[[Settings], Any]] = {
    "bc": bc, "td3_bc": td3_bc, "iql": iql, "cql": cql, "bcq": bcq, "bear": bear
}  # fmt: skip


def dataset(s: Settings) -> Any:
    """Random transitions of the task's shapes, in trajectories of `EPISODE`."""
    import d3rlpy
    import numpy as np

    rng = np.random.default_rng(0)
    rows = s["rows"]
    ends = np.zeros(rows, dtype=np.float32)
    ends[EPISODE - 1 :: EPISODE] = ends[-1] = 1
    return d3rlpy.dataset.MDPDataset(
        observations=rng.standard_normal((rows, s["state_dim"]), dtype=np.float32),
        actions=rng.uniform(-1, 1, (rows, s["action_dim"])).astype(np.float32),
        rewards=rng.standard_normal(rows, dtype=np.float32),
        terminals=np.zeros(rows, dtype=np.float32),
        timeouts=ends,
    )


def timed(algo: Any, table: Any, batch_size: int, steps: int, wait: Callable[[], None]) -> dict[str, float]:
    """Seconds of `steps` steps."""
    update = 0.0
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        batch = table.sample_transition_batch(batch_size)
        wait()
        before = time.perf_counter()
        algo.update(batch)
        wait()
        update += time.perf_counter() - before
    return {"update": update, "loop": time.perf_counter() - start}


def main() -> None:
    """Answer on what stdout was at first; whatever d3rlpy prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import d3rlpy
    import torch

    algo, table, settings = None, None, {}
    for line in sys.stdin:
        order = json.loads(line)
        if "steps" in order:
            found = timed(algo, table, settings["batch_size"], order["steps"], settings["wait"])
            answers.write(json.dumps(found) + "\n")
            continue
        torch.set_num_threads(order["threads"])
        torch.set_float32_matmul_precision("highest")  # on a GPU d3rlpy sets TF32 when it is imported
        cuda = order["device"] != "cpu"
        settings = {**order, "wait": torch.cuda.synchronize if cuda else lambda: None}
        table = dataset(order)
        algo = ALGORITHMS[order["algo"]](order).create(device=order["device"])
        algo.build_with_dataset(table)
        facts = {"peer": f"d3rlpy {d3rlpy.__version__}", "torch": torch.__version__, "compiled": bool(algo.compiled)}
        answers.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
