"""What MuJoCo 2.1.0 did and today's MuJoCo does not: how D4RL's environments weigh, take actions and fail.

D4RL's data were made with MuJoCo 2.1.0 through mujoco-py. The weight of capsules and the rounding of actions are
restored here, for every MuJoCo that compiles the model. The contact of capsules with boxes cannot be restored from
outside: it asks for the release named by `MUJOCO_VERSION`, which the requirements pin.
"""

import warnings
import xml.etree.ElementTree as ElementTree

import mujoco
import numpy as np

from utils.errors import UserError

__all__ = [
    "MUJOCO_VERSION",
    "count_instabilities",
    "d4rl_action",
    "restored_model",
    "version_warning",
    "warn_of_version",
]

MUJOCO_VERSION = "3.2.6"
"""The newest MuJoCo whose contacts are those of 2.1.0."""

WEIGHTS = ("body_mass", "body_inertia", "body_ipos", "body_iquat")
INSTABILITIES = [
    int(kind)
    for kind in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    )
]


def version_warning(installed: str) -> str | None:
    """Say what another MuJoCo than `MUJOCO_VERSION` changes; None where it is the right one."""
    if installed == MUJOCO_VERSION:
        return None
    number = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    changes = "contacts and solvers of this release were never compared with 2.1.0's"
    if number >= (3, 2, 7):
        changes = "ants touch AntMaze's walls differently (capsule-box contact, 3.2.7)"
    if number >= (3, 5, 0):
        changes += ", contact margins are added (3.5.0)"
    if number >= (4, 0, 0):
        changes += ", RK4 treats free joints differently (4.0.0)"
    return (
        f"mujoco {installed} is installed, D4RL's physics needs {MUJOCO_VERSION}: {changes}; "
        f"scores are not comparable (pip install mujoco=={MUJOCO_VERSION})"
    )


def warn_of_version() -> None:
    """Warn (`UserWarning`) if the installed MuJoCo is not the one that matches D4RL's."""
    message = version_warning(mujoco.__version__)
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=2)


def restored_model(xml: str) -> mujoco.MjModel:
    """Compile an MJCF text with the masses and inertias that MuJoCo 2.1.0 gave its capsules.

    2.1.0 weighed a capsule of radius r and cylinder length L as a cylinder of length L + r: mass ρπr²(L + r),
    inertia m(3r² + (L + r)²)/12 across and mr²/2 along. So the model is compiled a second time with such
    cylinders in place of its capsules, and the bodies' weights are taken from there. The compiler itself then
    merges geoms, turns principal axes and scales to a total mass, which a table or formulas of our own would have
    to repeat; the result equals the constants recorded from 2.1.0 to the last digits, and holds for any maze.
    """
    model = mujoco.MjModel.from_xml_string(xml)
    weighed = mujoco.MjModel.from_xml_string(_capsules_as_cylinders(xml))
    for name in WEIGHTS:
        getattr(model, name)[:] = getattr(weighed, name)
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


def d4rl_action(action: np.ndarray, shape: tuple[int, ...], high: np.ndarray) -> np.ndarray:
    """Clip actions to [-1, 1] and scale them to the actuators, rounding as D4RL's `NormalizedBoxEnv` did.

    D4RL computes low + (action + 1)/2 · (high - low) in the action's own precision. In float32 that moves an
    action by up to 6e-8. A plain clip leaves that out, and one step's qpos is then off by 4e-10 to 7e-8 instead
    of by 3e-14 at most.

    Args:
        action: of shape `shape`; float32 is computed in float32, anything else in float64.
        high: float32, the actuators' upper limits; the lower ones are their negatives.

    Returns:
        float64, the torques' controls.

    Raises:
        UserError: the shape is another or a value is NaN or infinite.
    """
    action = np.asarray(action)
    if action.shape != shape:
        raise UserError(f"action has shape {action.shape}, expected {shape}")
    if action.dtype != np.float32:
        action = action.astype(np.float64)
    if not np.isfinite(action).all():
        raise UserError("action has NaN or infinite values; expected numbers in [-1, 1]")
    scaled = -high + (action + 1.0) * 0.5 * (high + high)
    return np.clip(scaled, -high, high).astype(np.float64)


def count_instabilities(data: mujoco.MjData) -> int:
    """How often since its last reset MuJoCo found position, velocity or acceleration of `data` out of bounds.

    MuJoCo answers each by silently putting the model back to its initial state and going on.
    """
    return int(data.warning.number[INSTABILITIES].sum())
