"""A trained policy as one file that acts without this project: a program of torch.export.

policy = torch.export.load(FILE).module()
actions = policy(observations)  # float32 [N, state_dim] -> [N, action_dim]; seeded by torch.manual_seed
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_write
from utils.training.interfaces import Learner

EXAMPLE_ROWS = 4  # of the observations that the program is traced with; it takes any number


class Acting(torch.nn.Module):
    """Observations [N, state_dim] -> actions [N, action_dim] of an agent of one seed on a CPU.

    It draws from PyTorch's own generator: after `torch.manual_seed(k)` what `agent.act` draws from a generator of
    seed k.
    """

    def __init__(self, agent: Learner) -> None:
        super().__init__()
        self._agent = agent

    def forward(self, observations: Tensor) -> Tensor:
        draws = self._agent.act_draws([None], observations.shape[0])
        return self._agent.actions_for(observations.unsqueeze(0), draws).squeeze(0)


def export_policy(agent: Learner, path: Path, about: Mapping[str, Any]) -> None:
    """Write an agent of one seed on a CPU as a program; `about`, plain values, is its `policy.json`.

    Raises UserError for several seeds, another device, or where the disk refuses.
    """
    if agent.num_seeds != 1 or agent.device.type != "cpu":
        raise UserError(f"one seed on the CPU is exported, not {agent.num_seeds} on {agent.device}")
    example = torch.zeros(EXAMPLE_ROWS, agent.state_dim)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tensors that become the program's constants, as is meant
        rows = {0: torch.export.Dim.AUTO}  # any number: a named one has to be proved so, which a U-Net's strides escape
        program = torch.export.export(Acting(agent), (example,), dynamic_shapes=(rows,), strict=False)
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={"policy.json": json.dumps(about, sort_keys=True)})
    try:
        atomic_write(path, content.getbuffer())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
