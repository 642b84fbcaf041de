"""The progress bar on terminals of two widths, and its time left."""

from __future__ import annotations

import os
import re

import pytest

from tests.terminal import pieces, start
from utils.runs.progress import Bar, Clock, Now, fitted

PROGRAM = """
from utils.runs.progress import Bar, Now
bar = Bar(False)
bar.note("first line")
with bar.doing("compiling, which takes about a minute:"):
    pass
step, share = 0, None
bar.begin(0, 2_000_000, lambda: Now(step, 40, share))
bar.show(score=28.125, **{"lambda": float("nan")})
for step in range(0, 2_000_000, 100_001):
    share = 0.345 if step > 1_500_000 else None
    bar.draw()
    bar.show(**{"lambda": 1.02})
bar.note("step 2,000,000  normalised score 28.1")
bar.close()
"""


def drawn(columns: int) -> list[str]:
    """What a terminal so wide is sent, cut at every return of the carriage."""
    process, terminal = start(PROGRAM, columns=columns)
    sent = b"".join(pieces(terminal))
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    return re.split(r"[\r\n]+", sent.decode())


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nothing_is_wider_than_the_terminal(columns: int) -> None:
    lines = drawn(columns)
    assert max(map(len, lines)) < columns
    assert "first line" in lines and "step 2,000,000  normalised score 28.1" in lines
    training = [line for line in lines if "100,001/2,000,000" in line]
    assert training and all("%|" in line for line in training)
    if columns > 40:
        assert any(line.startswith("compiling, which takes about a minute: 0 s") for line in lines)
        assert "score 28.1, λ 1.02" in training[-1] and "steps/s" in training[-1]
        assert not any("nan" in line for line in lines)
        evaluating = [line for line in lines if "evaluating 34%" in line]
        assert evaluating and "λ 1.02" in evaluating[-1] and " left" in evaluating[-1]


def test_what_matters_least_is_left_out_first() -> None:
    pieces = [(0, "10/20"), (1, "3 steps/s"), (5, ""), (3, "score 5"), (4, "λ 1"), (2, "0:10 left")]
    assert fitted(pieces, 80) == "10/20, 3 steps/s, score 5, λ 1, 0:10 left"
    assert fitted(pieces, 36) == "10/20, 3 steps/s, score 5, 0:10 left"
    assert fitted(pieces, 30) == "10/20, 3 steps/s, 0:10 left"
    assert fitted(pieces, 1) == "10/20"


def test_the_time_left_counts_evaluations() -> None:
    clock = Clock()
    assert clock.left(Now(0, 4), 100) is None
    for seconds, now in (
        (0, Now(0, 4)), (10, Now(20, 4)), (11, Now(25, 4, share=0.0)), (13, Now(25, 4, share=0.5)),
    ):  # fmt: skip
        clock.look(seconds, now)
    assert clock.rate == pytest.approx(2)
    assert clock.left(now, 100) == pytest.approx(75 / 2 + 4 * 4 - 2)  # half of one took 2 s
    clock.look(16, now := Now(25, 3))
    assert clock.left(now, 100) == pytest.approx(75 / 2 + 3 * 5)
    clock.look(21, now := Now(40, 3))
    assert clock.rate == pytest.approx(35 / 15)  # what was done in the second in which it began is in neither
    assert clock.left(now, 100) == pytest.approx(60 * 15 / 35 + 15)


def test_evaluating_beside_stops_no_clock() -> None:
    clock = Clock()
    clock.look(0, Now(0))
    clock.look(10, now := Now(20, share=0.5, beside=True))
    clock.look(20, now := Now(40, beside=True))
    assert clock.left(now, 100) == pytest.approx(30)


def test_where_no_terminal_is_there_are_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(quiet=False)  # pytest's streams are none
    with bar.doing("compiling"):
        bar.note("a line")
    bar.begin(0, 10, lambda: Now(5))
    bar.draw()
    bar.close()
    assert capsys.readouterr() == ("a line\n", "")
