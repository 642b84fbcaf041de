"""The soak's figures of a long-lived process."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak.soak import Watched, last_words, tiny


def watched(memory: list[float], files: list[int]) -> Watched:
    process = object.__new__(Watched)
    process.samples = [(mib, count, 5, 0) for mib, count in zip(memory, files, strict=True)]
    return process


def test_a_file_that_is_open_for_a_moment_is_no_leak_and_one_that_stays_is() -> None:
    moments = [19, 18, 18, 18, 18, 19, 18, 19, 18, 18, 18, 18, 18, 18, 18, 18, 18, 19, 18, 18]
    first, last = watched([300.0, 302.0] + [301.0] * 16 + [304.0, 306.0], moments).figures()
    assert first == (301.0, 18, 5, 0) and last == (305.0, 18, 5, 0)
    first, last = watched([300.0] * 20, [18] * 10 + [19] * 10).figures()
    assert first[1:] == (18, 5, 0) and last[1:] == (19, 5, 0)


def test_one_sample_is_first_and_last() -> None:
    assert watched([300.0], [18]).figures() == ((300.0, 18, 5, 0), (300.0, 18, 5, 0))


def test_what_was_not_survived_comes_with_the_runs_own_words(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.hdf5")
    words = last_words(tiny("bc", "0", missing, tmp_path))
    assert words == f"run.py: no dataset file {missing}; give the path of a D4RL-format HDF5 file"
