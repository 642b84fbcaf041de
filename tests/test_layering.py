"""The rooms keep to themselves: who imports whom, and who compiles, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("agents", "utils", "experiments", "benchmarks", "hyperparameters", "run")


def files(room: str) -> list[Path]:
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            found.add((node.module or "").split(".")[0])
    return found & {*ROOMS, "tests"}


ALLOWED = {
    "agents": {"agents"},
    "utils": {"utils", "hyperparameters"},
    "hyperparameters": set(),
    "run": {"agents", "utils", "hyperparameters"},
    "experiments": {"agents", "utils", "hyperparameters", "experiments", "run"},
    "benchmarks": {"agents", "utils", "hyperparameters", "benchmarks", "run"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_stay_within_the_layers(room: str) -> None:
    paths = files(room)
    assert paths
    for path in paths:
        assert imported_rooms(path) <= ALLOWED[room], path


def uses(path: Path) -> Iterator[str]:
    """Dotted names that a file mentions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_only_execution_compiles_and_captures() -> None:
    watched = ("torch.compile", "torch.cuda.graph", "torch.cuda.CUDAGraph", "torch.jit")
    guilty = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in files(room)
        if any(name.startswith(watched) for name in uses(path))
    }
    assert guilty == {"utils/training/capture.py"}


def test_no_bare_except() -> None:
    for room in ROOMS:
        for path in files(room):
            handlers = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ExceptHandler)]
            assert all(handler.type is not None for handler in handlers), path
