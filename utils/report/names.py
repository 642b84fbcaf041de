"""What a reader tells the lines of a figure and the rows of a comparison apart by: short, and never a path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from utils.report.runs import RUN_OPTIONS, Cell, plain

SHOWN = 2  # settings that a short name spells out: those that fewest of the algorithm's methods have
OWN = "own settings"


def short_names(cells: Sequence[Cell]) -> list[str]:
    """A name for each cell: what sets its method apart from the others here, such as `kappa=0.04`.

    The algorithm is left out where all have the same, and so are changed settings that all share. Cells of one method
    have one name; those of two methods never do. Where the same task has several lengths of a method, its steps follow.
    """
    methods = dict.fromkeys(cell.method for cell in cells)
    of = {method: [cell for cell in cells if cell.method == method] for method in methods}
    names = {method: _name(own[0], of, cells) for method, own in of.items()}
    common = Counter(names.values())
    names = {method: method if common[name] > 1 else name for method, name in names.items()}
    steps = [f" ({cell.total_steps:,} steps)" if len(lengths(cell, cells)) > 1 else "" for cell in cells]
    return [names[cell.method] + length for cell, length in zip(cells, steps, strict=True)]


def _name(cell: Cell, methods: dict[str, list[Cell]], cells: Sequence[Cell]) -> str:
    """A method's name, by one of its cells."""
    alone = len({other.algo for other in cells}) == 1
    alike = [own[0] for own in methods.values() if own[0].algo == cell.algo]
    shared = {name for name in cell.changed if all(_shown(other, name) == _shown(cell, name) for other in cells)}
    told = {name for other in alike for name in other.told} - shared  # by some of this algorithm
    parts = [f"{name}={plain(cell.told[name])}" for name in sorted(told & set(cell.told))]
    if not parts and len(told) == 1 and len(alike) > 1:  # the task's own value of the one setting that is compared
        (name,) = told
        values = {_shown(own, name) for own in methods[cell.method]}
        parts = [f"{name}={value}" for value in values if value] if len(values) == 1 else []
    if len(parts) > SHOWN:
        having = {text: sum(_has(other, text) for other in alike) for text in parts}
        rarest = sorted((text for text in parts if having[text] < len(alike)), key=having.__getitem__)[:SHOWN]
        telling = [text for text in parts if text in rarest]
        parts, alone = (
            [*telling, f"+{len(parts) - len(telling)}" if telling else f"({len(parts)} settings changed)"],
            False,
        )
    copy = [cell.copy] if cell.copy else []
    if alone and told and len(methods) > 1:
        return " ".join(parts + copy) or OWN
    return " ".join([cell.algo, *parts, *copy])


def _shown(cell: Cell, name: str) -> str:
    """The value of a setting or of a run's option; "" where the algorithm has none such."""
    usual = RUN_OPTIONS.get(name)
    return plain({**cell.runs[0].settings, **cell.changed}.get(name, "" if usual is None else usual))


def _has(cell: Cell, text: str) -> bool:
    """Whether NAME=VALUE is part of a cell's name."""
    return text in (f"{name}={plain(value)}" for name, value in cell.told.items())


def lengths(cell: Cell, cells: Sequence[Cell]) -> list[int]:
    """The numbers of steps that a cell's method was run for on its task and data, rising."""
    key = (cell.label, cell.env_name, cell.method)
    return sorted({other.total_steps for other in cells if (other.label, other.env_name, other.method) == key})
