"""Decision Diffuser (Ajay et al. 2023, arXiv 2211.15657): states denoised for a return, and the actions between them.

    tau = (s_0, s_1, ..., s_{H-1})                              a window of states, its first one pinned
    min_theta  E || eps - eps_theta(tau^i, y, i) ||^2           y the return, left out in a quarter of the rows
    min_phi    E || a_t - f_phi(s_t, s_{t+1}) ||^2              inverse dynamics
    eps-hat = eps_theta(tau^i, -, i) + w (eps_theta(tau^i, y, i) - eps_theta(tau^i, -, i))

The published code (anuragajay/decision-diffuser, 01ce528) has settings for hopper-medium-expert alone, and departs from
its paper in most of them; the code is followed. Other tasks take its settings but for `returns_scale`, for which this
project has a rule of its own: the largest return of the data / 0.9, which is what the one known value, 400, comes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents.parts.agent import Batch, Draws, Outcome
from agents.parts.draws import Rng, integers, keep_masks, normals
from agents.parts.layers import MLP
from agents.parts.parameters import Sizes
from agents.parts.planner import Planner, flops
from agents.parts.unet import TemporalUNet, multipliers
from agents.parts.windows import CDFNormalizer, WindowRows, conditioned_plans, inverse_loss, noise_loss

BEST_SHARE = 0.9  # what the data's largest return is scaled to where `returns_scale` is 0


class DecisionDiffuser(Planner):
    """The agent of `--algo decision_diffuser`; `config` is a `hyperparameters.DecisionDiffuserConfig`."""

    METRICS = ("bc_loss", "inverse_loss", "return_mean", "diffusion_grad_norm", "inverse_grad_norm")
    SHOWN = ("bc_loss",)
    COMPILED = ("planning_loss",)
    ACTS_BY_DATA = True  # every distinct value of states and actions: too many for a checkpoint
    PUBLISHED_COST = "the published size: 1,286"

    def build(self) -> None:
        super().build()
        c, self.channels = self.config, self.state_dim
        self.diffusion = self.learn("diffusion", _unet(c, self.sizes), c.learning_rate)
        widths = [2 * self.state_dim, c.inverse_dim, c.inverse_dim, self.action_dim]
        inverse = MLP(widths, self.sizes, prefix="inv_model")
        self.inverse = self.learn("inverse", inverse, c.learning_rate, published="diffusion")
        self.diffusion_ema = self.average("diffusion", self.diffusion)
        self.inverse_ema = self.named_averages("diffusion", "inverse", self.inverse)
        # Made of the data again on resume: they hold every distinct value.
        self.state_normalizer = CDFNormalizer(self.state_dim, self.device)
        self.action_normalizer = CDFNormalizer(self.action_dim, self.device)
        self.returns_scale = torch.full((), c.returns_scale or 1.0, device=self.device)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, c = self.num_seeds, self.config
        return {
            "timesteps": integers(rng, n, steps, c.diffusion_steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, c.horizon, self.state_dim)),
            "keep": keep_masks(rng, n, steps, c.condition_dropout, (batch_size, 1)),
        }

    def observe(self, transitions: WindowRows) -> None:
        """The distribution of states and actions, by which windows come normalised, and the scale of the returns."""
        self.state_normalizer.fit(transitions.observations)
        self.action_normalizer.fit(transitions.actions)
        transitions.normalize(self.state_normalizer, self.action_normalizer)
        if self.config.returns_scale == 0:
            largest = float(transitions.returns.max())
            if largest <= 0:
                raise ValueError(f"the largest return is {largest:.4g}, which gives no scale; set returns_scale")
            self.returns_scale.fill_(largest / BEST_SHARE)

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = self.descend_together({("diffusion", "inverse"): self.planning_loss(batch, draws)})
        if step % self.config.ema_interval == 0:
            self.diffusion_ema.follow(self.diffusion)
            self.inverse_ema.follow(self.inverse)
        return metrics

    def planning_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The mean of the noise's and the inverse dynamics' squared errors [S]."""
        returns, x = batch["returns"] / self.returns_scale, batch["observations"]
        arguments = (returns, draws["timesteps"], draws["noise"], draws["keep"])
        noise = noise_loss(self.diffusion, self.process, x, *arguments)
        inverse = inverse_loss(self.inverse, x, batch["actions"])
        found = {"bc_loss": noise.detach(), "inverse_loss": inverse.detach(), "return_mean": returns.mean(dim=(1, 2))}
        return (noise + inverse) / 2, found

    # --- Acting -----------------------------------------------------------------------------------------

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The action that leads from the state to the next one of its plan, cut to the action box."""
        c, observation = self.config, self.state_normalizer(states)
        wanted = (c.target_return, c.guidance_weight, c.temperature)
        x = conditioned_plans(self.diffusion_ema, self.process, *wanted, observation, noise["noise"].squeeze(2))
        actions = self.action_normalizer.inverse(self.inverse_ema(x[:, :, :2].flatten(2)))
        return actions.clamp(-self.max_action, self.max_action)

    @classmethod
    def acting_flops(cls, config: Any, sizes: Sizes) -> float:
        c, unet = config, _unet(config, sizes).averaged()
        x = torch.zeros(1, 1, c.horizon, sizes.state_dim, device="meta")
        embedding = torch.zeros(1, 2, 1, 2 * c.hidden_dim, device="meta")
        return c.diffusion_steps * flops(unet.under, x, embedding)


def _unet(config: Any, sizes: Sizes) -> TemporalUNet:
    mults = multipliers(config.dim_mults)
    return TemporalUNet(sizes, sizes.state_dim, config.horizon, config.hidden_dim, mults, conditioned=True)
