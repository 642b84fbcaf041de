"""The rooms keep to themselves: who imports whom, and who compiles, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("agents", "benchmarks", "experiments", "hyperparameters", "play", "run", "utils")  # what the rules are for

ALGORITHM = "an algorithm"  # any module of agents/ but its registry
GROUND = {
    "utils.errors", "utils.files", "utils.interrupts", "utils.process", "utils.seeding", "utils.tasks",
    "utils.runs.columns",
}  # fmt: skip
UTILS = GROUND | {
    "utils.behaviour", "utils.classic", "utils.data", "utils.describe", "utils.environments", "utils.launch",
    "utils.making", "utils.options", "utils.report", "utils.runs", "utils.sources", "utils.sweep", "utils.trained",
    "utils.training", "utils.video",
}  # fmt: skip
LEARNING = {"hyperparameters", "agents", "agents.parts"} | UTILS

# Who may import whom, from the ground up: a row names only rows above it, so that no circle of rooms can be written
# down. A module belongs to the longest name that it begins with; modules of a room may import one another, algorithms
# may not.
ALLOWED: dict[str, set[str]] = {
    "hyperparameters": set(),
    "agents.parts": set(),
    ALGORITHM: {"agents.parts"},
    "agents": {ALGORITHM, "agents.parts"},
    "utils.errors": set(),
    "utils.files": {"utils.errors"},
    "utils.interrupts": set(),
    "utils.seeding": {"utils.errors"},
    "utils.process": {"utils.errors"},
    "utils.tasks": {"utils.errors"},
    "utils.runs.columns": {"utils.errors"},
    "utils.classic": {"utils.errors", "utils.files"},
    "utils.data": GROUND,
    "utils.environments": GROUND,
    "utils.runs": GROUND,
    "utils.options": GROUND | {"hyperparameters"},
    "utils.sweep": GROUND,
    "utils.video": GROUND,
    "utils.behaviour": GROUND | {"utils.data", "utils.environments", "utils.options"},
    "utils.training": GROUND | {"utils.data"},
    "utils.report": GROUND | {"hyperparameters", "utils.options", "utils.runs"},
    "utils.sources": GROUND
    | {"hyperparameters", "utils.behaviour", "utils.classic", "utils.data", "utils.environments", "utils.training"},
    "utils.making": GROUND | {"utils.runs", "utils.training"},
    "utils.trained": GROUND
    | {"hyperparameters", "utils.making", "utils.runs", "utils.sources", "utils.training", "utils.video"},
    "utils.launch": GROUND
    | {"hyperparameters", "utils.making", "utils.options", "utils.runs", "utils.sources", "utils.training"},
    "utils.describe": GROUND | {"utils.behaviour", "utils.data", "utils.environments", "utils.options"},
    "run": LEARNING,
    "play": LEARNING,
    "experiments.study": LEARNING | {"run", "play"},
    "experiments.toy": LEARNING,
    "experiments": LEARNING | {"run", "play", "experiments.study", "experiments.toy"},
    "benchmarks.fidelity": LEARNING | {"play"},
    "benchmarks.soak": LEARNING | {"run", "play"},
    "benchmarks": LEARNING | {"run", "play"},
}


def sources(root: Path) -> dict[str, Path]:
    """The house's modules by dotted name; a package goes by its folder's."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in HOUSE:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the house that a file imports anywhere in it, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide which room is meant"
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in modules else node.module for name in inner}
    return {name for name in found if name.split(".")[0] in (*HOUSE, "tests")}


def room(module: str) -> str:
    """Raises LookupError for a module that stands in no room."""
    parts = module.split(".")
    if parts[0] == "agents" and parts[1:2] not in ([], ["parts"]):
        return ALGORITHM
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    if found := next((name for name in names if name in ALLOWED), None):
        return found
    if module == "utils" or parts[0] == "tests":
        return parts[0]  # utils/__init__.py is empty; nobody may import the tests
    raise LookupError(f"{module} stands in no room: give it a row in ALLOWED (tests/test_layering.py)")


def graph(root: Path) -> dict[str, set[str]]:
    files = sources(root)
    return {module: imports(path, set(files)) for module, path in files.items()}


def forbidden(root: Path) -> list[str]:
    """Imports that no row allows, as 'importer -> imported'."""
    wrong = []
    for module, imported in graph(root).items():
        here = room(module)
        for name in sorted(imported):
            there = room(name)
            within = here == there and here != ALGORITHM
            if not within and there not in ALLOWED.get(here, set()):
                wrong.append(f"{module} -> {name}")
    return wrong


def test_every_import_is_an_allowed_one() -> None:
    assert len(sources(ROOT)) > 80
    assert forbidden(ROOT) == []


def test_no_circle_of_imports() -> None:
    TopologicalSorter(graph(ROOT)).prepare()  # raises CycleError and names the circle


def test_the_rule_itself_points_downwards() -> None:
    above: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= above, (name, allowed - above)
        above.add(name)


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("agents/cql.py", "from agents.iql import IQL", "agents.cql -> agents.iql"),
        ("agents/cql.py", "from agents import AGENTS", "agents.cql -> agents"),
        ("agents/parts/losses.py", "from agents import iql", "agents.parts.losses -> agents.iql"),
        ("agents/parts/losses.py", "import utils.errors", "agents.parts.losses -> utils.errors"),
        ("agents/parts/losses.py", "import hyperparameters", "agents.parts.losses -> hyperparameters"),
        ("hyperparameters.py", "from utils.errors import UserError", "hyperparameters -> utils.errors"),
        ("utils/data/d4rl.py", "def f():\n    from utils import environments", "utils.data.d4rl -> utils.environments"),
        ("utils/classic.py", "from utils import environments", "utils.classic -> utils.environments"),
        ("utils/training/faults.py", "from utils.runs import log", "utils.training.faults -> utils.runs.log"),
        ("utils/training/faults.py", "from agents import iql", "utils.training.faults -> agents.iql"),
        ("utils/report/build.py", "import utils.training.faults", "utils.report.build -> utils.training.faults"),
        ("utils/runs/columns.py", "from utils.runs import log", "utils.runs.columns -> utils.runs.log"),
        ("play.py", "import run", "play -> run"),
        (
            "experiments/toy/exact.py",
            "import experiments.study.data",
            "experiments.toy.exact -> experiments.study.data",
        ),
        ("benchmarks/speed.py", "from tests.small import d4rl_file", "benchmarks.speed -> tests.small"),
        ("agents/cql.py", "from agents.parts import losses", None),
        ("agents/__init__.py", "from agents import cql, iql", None),
        ("utils/training/faults.py", "from utils.runs.columns import STOPPED", None),
        ("utils/runs/log.py", "from utils.runs import folder", None),
        ("benchmarks/speed.py", "from run import main", None),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, path: str, line: str, found: str | None) -> None:
    for name in ("agents/iql", "utils/environments/__init__", "utils/runs/folder", "utils/runs/log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line)
    assert forbidden(tmp_path) == ([] if found is None else [found])


def test_a_module_without_a_room_is_refused(tmp_path: Path) -> None:
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "misc.py").touch()
    with pytest.raises(LookupError, match=r"utils\.misc stands in no room"):
        forbidden(tmp_path)


def names(path: Path) -> Iterator[str]:
    """Dotted names that a file mentions, and those that it imports from a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_one_file_compiles_and_captures() -> None:
    watched = ("torch.compile", "torch.cuda.graph", "torch.cuda.CUDAGraph", "torch.jit", "torch.cuda.make_graphed")
    guilty = {name for name, path in sources(ROOT).items() if any(used.startswith(watched) for used in names(path))}
    assert guilty == {"utils.training.capture"}


def test_no_bare_except() -> None:
    for path in sources(ROOT).values():
        handlers = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler)]
        assert all(handler.type is not None for handler in handlers), path
