"""The learning rules. This dict is the whole registry: `--algo` takes its keys."""

from agents.agent import Agent
from agents.diffcps import DiffCPS

__all__ = ["AGENTS"]

AGENTS: dict[str, type[Agent]] = {
    "diffcps": DiffCPS,
}
