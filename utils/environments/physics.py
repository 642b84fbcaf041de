"""What MuJoCo 2.1.0 and D4RL did and today's stack does not, restored for every MuJoCo that compiles the model.

D4RL's data were made with MuJoCo 2.1.0 through mujoco-py. Restored are the weights of capsules, the contact margins,
the rounding of actions, and that an unstable simulation ends its episode. What no model can restore concerns AntMaze
alone: the contact of capsules with boxes (since 3.2.7), and how RK4 turns a free joint (since 4.0.0).
"""

import os
import pathlib
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from typing import Any, cast

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

from utils.errors import UserError

MUJOCO_VERSION = "3.2.6"
"""The newest MuJoCo whose AntMaze is that of 2.1.0."""

WEIGHTS = ("body_mass", "body_inertia", "body_ipos", "body_iquat")
# MuJoCo's warnings of bad positions, velocities, accelerations and controls stand last, in this order.
FIRST_UNSTABLE = int(mujoco.mjtWarning.mjWARN_BADQPOS)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


MARGINS_ADD_UP = _number(mujoco.__version__) >= (3, 5, 0)


def antmaze_warning(installed: str) -> str | None:
    """What differs in AntMaze with the MuJoCo of version `installed`; None where nothing does."""
    if _number(installed) < (3, 2, 7):
        return None
    changes = "ants touch walls differently (contact of capsules with boxes, since 3.2.7)"
    if _number(installed) >= (4, 0, 0):
        changes += ", and they turn differently (RK4 of a free joint, since 4.0.0)"
    return (
        f"AntMaze with mujoco {installed} is not quite D4RL's: {changes}. Everything else is as with "
        f"mujoco {MUJOCO_VERSION}, which has D4RL's AntMaze and needs Python 3.13 or older"
    )


def warn_of_antmaze() -> None:
    """Warn (`UserWarning`) where the installed MuJoCo has not D4RL's AntMaze."""
    message = antmaze_warning(mujoco.__version__)
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=3)


def restored_model(xml: str) -> mujoco.MjModel:
    """Compile an MJCF text with the weights of capsules and the contact margins of MuJoCo 2.1.0.

    2.1.0 weighed a capsule of radius r and cylinder length L as a cylinder of length L + r: mass ρπr²(L + r),
    inertia m(3r² + (L + r)²)/12 across and mr²/2 along. So the model is compiled a second time with such
    cylinders in place of its capsules, and the bodies' weights are taken from there. MuJoCo's compiler then merges
    geoms, turns principal axes and scales to a total mass, which formulas of our own would have to repeat and a
    table to list. The result equals the constants recorded from 2.1.0 to the last digits.

    Two geoms touch within a margin: the larger of theirs in 2.1.0, the sum since 3.5.0. In these models all geoms have
    the same margin, so half of it for each sums to the old one, exactly.
    """
    model = mujoco.MjModel.from_xml_string(xml)
    weighed = mujoco.MjModel.from_xml_string(_capsules_as_cylinders(xml))
    for name in WEIGHTS:
        getattr(model, name)[:] = getattr(weighed, name)
    if MARGINS_ADD_UP:
        assert np.ptp(model.geom_margin) == 0, "halving restores equal margins only"
        model.geom_margin /= 2
    # What follows from the weights: subtree masses, inverse weights, dof_M0, actuator_acc0, statistics.
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def _capsules_as_cylinders(xml: str) -> str:
    root = ElementTree.fromstring(xml)
    for geom in root.iter("geom"):
        if geom.get("type") != "capsule":
            continue
        geom.set("type", "cylinder")
        size = _numbers(geom.get("size", ""))
        if "fromto" in geom.attrib:
            start, end = _numbers(geom.get("fromto", "")).reshape(2, 3)
            extension = (end - start) / np.linalg.norm(end - start) * size[0] / 2
            geom.set("fromto", _text(np.concatenate([start - extension, end + extension])))
        else:
            geom.set("size", _text(np.array([size[0], size[1] + size[0] / 2])))
    return ElementTree.tostring(root, encoding="unicode")


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=np.float64)


def _text(numbers: np.ndarray) -> str:
    return " ".join(repr(float(number)) for number in numbers)


def instabilities(data: mujoco.MjData) -> np.ndarray:
    """How often MuJoCo found positions, velocities, accelerations, controls out of bounds since the last reset.

    MuJoCo's own answer is to put the model silently back to its initial state and to go on. The int32 [4] is a view
    that stays current.
    """
    return data.warning.number[FIRST_UNSTABLE:]


class D4RLPhysics(MujocoEnv):
    """What D4RL's environments share: 2.1.0's weights and margins, clipped actions, unstable ends, rendering.

    A mixin for gymnasium's MuJoCo environments. `control`, and the task's `observe` and `judge`, work on arrays of
    many environments, for `utils.environments.lockstep.LockstepEnvs`. A window ("human") is gymnasium's wrapper around
    `rgb_array`.
    """

    metadata = gymnasium.Env.metadata | {"render_modes": ["rgb_array", "depth_array"]}

    def mjcf(self) -> str:
        """The model's MJCF text, before its weights and margins are restored."""
        return pathlib.Path(self.fullpath).read_text()

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = restored_model(self.mjcf())
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def _set_action_space(self) -> spaces.Box:
        """Keep the actuators' range for `control`; actions themselves are in [-1, 1]."""
        self._control_high = self.model.actuator_ctrlrange[:, 1].astype(np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, self._control_high.shape, np.float32)
        return self.action_space

    def control(self, actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Clip actions to [-1, 1] and scale them to the actuators, rounding as D4RL's `NormalizedBoxEnv` did.

        D4RL computes low + (action + 1)/2 · (high - low) in the action's own precision. In float32 that moves an
        action by up to 6e-8. A plain clip leaves that out, and one step's qpos is then off by 4e-10 to 7e-8
        instead of by 3e-14 at most.

        `actions` have the `shape` [A] or [n, A]; float32 is computed in float32, anything else in float64, and comes
        out so. UserError where the shape is another or a value is NaN or infinite.
        """
        actions = np.asarray(actions)
        if actions.shape != shape:
            raise UserError(f"action has shape {actions.shape}, but this environment takes {shape}")
        if actions.dtype != np.float32:
            actions = actions.astype(np.float64)
        if not np.isfinite(actions).all():
            raise UserError("action has NaN or infinite values; give numbers in [-1, 1]")
        high = self._control_high
        return np.clip(-high + (actions + 1.0) * 0.5 * (high + high), -high, high)

    # gymnasium's types promise NumPy scalars and an `info` of numbers alone; its environments keep to neither.
    def step(  # type: ignore[override]
        self, action: np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Clip the action and step.

        An unstable simulation ends the episode: terminated, reward 0, the last observation once more, a warning
        and `info["unstable"]`. UserError where the action is NaN, infinite or of the wrong shape.
        """
        control = self.control(action, self._control_high.shape)
        last = cast(Any, self)._get_obs()  # the task's own
        observation, reward, terminated, truncated, info = self._step_task(control)
        info["unstable"] = bool(instabilities(self.data).any() or not np.isfinite(observation).all())
        if info["unstable"]:
            warnings.warn("the simulation became unstable: its episode ends", RuntimeWarning, stacklevel=2)
            return last, 0.0, True, truncated, info
        return observation, float(reward), bool(terminated), truncated, info

    def _step_task(self, control: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return super().step(control)

    def render(self) -> np.ndarray | None:
        """A frame of the `render_mode`: uint8 [height, width, 3], or depths [height, width].

        UserError where OpenGL cannot draw offscreen here.
        """
        if self.render_mode is None:
            return super().render()
        find_opengl()
        try:
            return super().render()
        except (mujoco.FatalError, RuntimeError, ImportError, AttributeError) as error:
            name = os.environ.get("MUJOCO_GL", "the display's")
            raise UserError(f"nothing can be rendered with {name} OpenGL: set MUJOCO_GL to egl or osmesa") from error


def find_opengl() -> None:
    """Choose an offscreen OpenGL where nobody did and no display is there: EGL, else OSMesa.

    gymnasium would take GLFW, which fails without a display. Each is tried in a process of its own, because a
    failed one cannot be unloaded.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")):
        return
    for name in ("egl", "osmesa"):
        test = f"from mujoco.{name} import GLContext; GLContext(8, 8).make_current()"
        environ = {**os.environ, "MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", test], env=environ, capture_output=True, check=False).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise UserError("nothing can be rendered: no OpenGL (install libegl1 or libosmesa6, or set MUJOCO_GL)")
