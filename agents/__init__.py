"""The learning rules. This dict is the whole registry: `--algo` takes its keys."""

from agents.awr import AWR
from agents.bc import BC
from agents.bcq import BCQ
from agents.bear import BEAR
from agents.cql import CQL
from agents.decision_diffuser import DecisionDiffuser
from agents.diffcps import DiffCPS
from agents.diffuser import Diffuser
from agents.diffusion_bc import DiffusionBC
from agents.diffusion_ql import DiffusionQL
from agents.dtql import DTQL
from agents.idql import IDQL
from agents.iql import IQL
from agents.parts.agent import Agent
from agents.qgpo import QGPO
from agents.sfbc import SfBC
from agents.td3_bc import TD3BC

AGENTS: dict[str, type[Agent]] = {
    "diffcps": DiffCPS,
    "diffusion_ql": DiffusionQL,
    "diffusion_bc": DiffusionBC,
    "dtql": DTQL,
    "bc": BC,
    "awr": AWR,
    "td3_bc": TD3BC,
    "bcq": BCQ,
    "bear": BEAR,
    "sfbc": SfBC,
    "iql": IQL,
    "cql": CQL,
    "idql": IDQL,
    "qgpo": QGPO,
    "diffuser": Diffuser,
    "decision_diffuser": DecisionDiffuser,
}
