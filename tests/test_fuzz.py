"""Whatever is typed, and whatever stands in a file: it works, or it is one line and exit code 2."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hyperparameters
import run
from agents import AGENTS
from benchmarks.soak.soak import tiny
from tests import small
from tests.small import d4rl_file
from utils import launch, options
from utils.data import d4rl
from utils.data.dataset import Dataset
from utils.errors import UserError
from utils.process import Stop
from utils.runs import checkpoint
from utils.runs.folder import prepare_folders
from utils.runs.summary import summary_table

fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# The system passes no NUL in an argument.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
NUMBERS = st.one_of(st.integers(-(10**20), 10**20), st.floats()).map(str)
WORDS = st.sampled_from(["", "-1", "0", "1", "nan", "inf", "1e400", "0-3", "3-1", "0,0", "cuda:9", "auto", "no", "--"])


def outcome(argv: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines on stderr; any other exception is the test's."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, error.getvalue().splitlines()


def check(argv: list[str]) -> int:
    code, lines = outcome(argv)
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), (argv, code, lines)
    return code


# --- Command lines ----------------------------------------------------------------------------------------------------


FLAGS = sorted(
    {
        flag
        for algo in AGENTS
        for action in options.build_parser(algo, AGENTS)._actions
        for flag in action.option_strings
    }
    - {"-h", "--help"}
)


class AsFarAsTheAgent:
    """In place of the data and of what follows the agent's constructor: a table of ten rows, and no folder."""

    def __init__(self, *_: object, **__: object) -> None:
        self.max_action = 1.0

    def load(self) -> Dataset:
        return small.dataset(10)

    def environments(self, number: int) -> AsFarAsTheAgent:
        return self


ARRIVALS: list[str] = []  # an entry per command line that got as far as a finished agent


def reached(*_: object, **__: object) -> None:
    ARRIVALS.append("a finished agent")
    raise UserError("reached")


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Runs end where the agent is made; memory beyond some GiB cannot be had."""
    choose = launch.sources.choose
    monkeypatch.setattr(launch.sources, "choose", lambda *words: choose(*words) and AsFarAsTheAgent())
    monkeypatch.setattr(launch, "Runner", reached)
    monkeypatch.setattr(launch, "choose_threads", lambda *words: (1, "nothing is timed"))
    monkeypatch.setattr(launch, "keep_freed_memory", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def any_value(algo: str, chosen: list[tuple[str, str]]) -> None:
    check(["--algo", algo, "--env_name", "hopper-medium-v2", *(word for pair in chosen for word in pair)])


SOME_WORDS = st.lists(
    st.one_of(st.sampled_from(FLAGS), WORDS, NUMBERS, TEXT, st.sampled_from(list(AGENTS))), max_size=6
)


MAGNITUDES = st.builds(lambda mantissa, exponent: f"{mantissa}e{exponent}", st.integers(-9, 9), st.integers(-50, 45))
FITTING = {
    int: st.one_of(st.integers(0, 300), st.integers(-3, 10**20), st.integers(2**31 - 2, 2**31 + 2)).map(str),
    float: st.one_of(st.floats(0, 1).map(str), MAGNITUDES, st.floats(allow_nan=False).map(str)),
    str: TEXT,
    options.number_or_auto: st.one_of(st.just("auto"), st.floats(allow_nan=False).map(str), MAGNITUDES),
    options.thread_number: st.one_of(st.just("auto"), st.integers(-3, 10**20).map(str)),
}


@st.composite
def settings_of(draw: st.DrawFn, most: int = 3) -> tuple[str, list[tuple[str, str]]]:
    """An algorithm, and at most so many flags that it has with values of all kinds, mostly of the flag's own."""
    algo = draw(st.sampled_from(list(AGENTS)))
    known = {a.option_strings[0]: a.type for a in options.build_parser(algo, AGENTS)._actions
             if a.nargs is None and a.type}  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=most, unique=True))
    fitting = draw(st.integers(0, 3)) > 0
    return algo, [(flag, draw(FITTING[known[flag]] if fitting else st.one_of(WORDS, NUMBERS, TEXT))) for flag in chosen]


@pytest.mark.usefixtures("shortened")
@fuzz
@given(SOME_WORDS)
def test_any_words(words: list[str]) -> None:
    check(words)


@pytest.mark.usefixtures("shortened")
@fuzz
@given(settings_of())
def test_any_value_of_any_flag(command: tuple[str, list[tuple[str, str]]]) -> None:
    """Everything that a command line says is checked before a file is touched, or is fit to make an agent of."""
    any_value(*command)


@pytest.mark.slow
@pytest.mark.usefixtures("shortened")
def test_many_command_lines_that_make_an_agent() -> None:
    """About a quarter of the command lines drawn are fit for it; the others are one line each.

    With FUZZ_EXAMPLES=4500 in the environment it is over a thousand agents, in some three minutes of CPU time.
    """
    examples = int(os.environ.get("FUZZ_EXAMPLES", "1000"))

    @settings(fuzz, max_examples=examples)
    @given(settings_of(most=2))
    def many(command: tuple[str, list[tuple[str, str]]]) -> None:
        any_value(*command)

    ARRIVALS.clear()
    many()
    assert len(ARRIVALS) >= examples / 5


@fuzz
@given(TEXT)
def test_any_path_of_a_dataset(tmp_path: Path, text: str) -> None:
    code = check(
        ["--env_name", "hopper-medium-v2", "--dataset", f"./{text}{'x' * 300}", "--dir", str(tmp_path / "out")]
    )
    assert code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "1e39"], "learning_rate must lie within ±3.4e+38, what a float32 holds, not 1e+39"),
        (["--learning_rate", "1e-39"], "learning_rate must be 0 or at least 1.18e-38, what a float32 holds, not 1e-39"),
        (["--local_size", "9" * 20], "--local_size must be below 2^31"),
        (["--batch_size", "9" * 20], "batch_size must lie within ±2^63"),
        (["--seeds", "0-999999999999999"], "must name between 1 and 1024"),
        (["--seeds", str(2**63)], "below 2^63"),
        (["--threads", "2000000000"], "between 1 and 1024"),
        (["--algo", "bcq", "--hidden_dim", "1"], "no agent can be made with these settings: float division by zero"),
        (["--hidden_dim", "1000000000000"], "out of memory"),
        (["--batch_size", "1000000000000"], "out of memory"),
        (["--dir", "/dev/null/x"], "cannot write"),
        (["--dir", "x" * 300], "cannot write"),
        (["--load_published", "actor=/nowhere", "aktor=/nowhere"], "no file /nowhere"),
        (["--load_published", "aktor=/nowhere"], "has no 'aktor'; it takes actor"),
        (["--dataset", "two\nlines"], "two lines"),
    ],
)
def test_what_would_cost_dearly_or_pass_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(d4rl_file(tmp_path / "hopper.hdf5"))
    code, lines = outcome([*tiny("diffusion_bc", "0", data, tmp_path / "out"), *flags])
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert all(len(path.read_bytes().splitlines()) == 1 for path in tmp_path.rglob("metrics.csv"))


# --- A run's own files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two seeds; the data lie beside it."""
    base = tmp_path_factory.mktemp("finished")
    data = str(d4rl_file(base / "hopper.hdf5"))
    assert run.main(tiny("bc", "0,1", data, base / "runs")) == 0
    return base


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "bc" / "hopper-medium-v2"


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut, with other bytes, with some inserted, or other content altogether."""
    places = st.integers(0, len(content) - 1)
    return st.one_of(
        places.map(lambda at: content[:at]),
        st.tuples(places, st.binary(min_size=1, max_size=4)).map(
            lambda c: content[: c[0]] + c[1] + content[c[0] + 1 :]
        ),
        st.tuples(places, st.binary(max_size=40)).map(lambda c: content[: c[0]] + c[1] + content[c[0] :]),
        st.binary(max_size=60),
        st.sampled_from(
            [b"null", b"[]", b'{"settings": 3}', b'{"settings": {}, "dataset": [], "run": {}}', b"[" * 5000]
        ),
    )


def one_line(function: Callable[[], Any]) -> bool:
    """Whether it worked; if not, that was one line for the user."""
    try:
        function()
        return True
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return False


@fuzz
@given(st.data())
def test_any_configuration_file(copied: Path, data: st.DataObject) -> None:
    """Only a file that says the same settings continues; whatever else, the run's files stay as they are."""
    path = copied / "seed_0" / "config.json"
    original = (copied / "seed_1" / "config.json").read_bytes()
    config = json.loads(original)
    path.write_bytes(data.draw(damages(original)))
    before = (copied / "seed_0" / "metrics.csv").read_bytes()
    if one_line(lambda: prepare_folders([copied / "seed_0"], [{**config, "seed": 0}], True, False)):
        assert json.loads(path.read_text())["settings"] == config["settings"]
    assert (copied / "seed_0" / "metrics.csv").read_bytes() == before


@fuzz
@given(st.data())
def test_any_csv_file(copied: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["metrics.csv", "evaluations.csv"]))
    path = copied / "seed_0" / name
    path.write_bytes(data.draw(damages((copied / "seed_1" / name).read_bytes())))
    one_line(lambda: summary_table([copied / "seed_0", copied / "seed_1"]))


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "evaluations.csv", "checkpoint.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 50, b"null"])
def test_a_damaged_file_of_a_run_that_is_resumed(finished: Path, copied: Path, name: str, content: bytes) -> None:
    """From the command line: one line and nothing changed; a checkpoint alone has the one before to go back to."""
    (copied / "seed_1" / name).write_bytes(content)
    before = {path: path.read_bytes() for path in copied.rglob("*.*") if path.is_file()}
    argv = tiny("bc", "0,1", str(finished / "hopper.hdf5"), copied.parents[1], "--resume")
    code, lines = outcome(argv)
    if name == "checkpoint.pt":
        assert (
            code == 0 and len(lines) == 1 and lines[0].startswith("warning: ") and "continuing from step 8" in lines[0]
        )
        return
    assert code == 2 and len(lines) == 1 and name in lines[0], lines
    if name == "config.json":
        assert {path: path.read_bytes() for path in before} == before


def nodes(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(state, dict):
        for key, value in state.items():
            yield from nodes(value, (*path, key))


WRONG = st.sampled_from(
    ["gone", None, 3, -1, "text", [], {}, torch.zeros(0), torch.zeros(2, 3, 4), torch.ones(1).bool()]
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@fuzz
@given(st.data())
def test_a_checkpoint_of_any_other_form(finished: Path, data: st.DataObject) -> None:
    """Whole by its checksum, but not what this agent writes: one line."""
    folder = finished / "runs" / "bc" / "hopper-medium-v2" / "seed_0"
    state = copy.deepcopy(checkpoint.load(folder / "checkpoint.pt"))
    *parents, last = data.draw(st.sampled_from(list(nodes(state))))
    inner = state
    for key in parents:
        inner = inner[key]
    if (wrong := data.draw(WRONG)) == "gone":
        del inner[last]
    else:
        inner[last] = wrong
    argv = tiny("bc", "0", str(finished / "hopper.hdf5"), finished / "other", "--overwrite")
    with contextlib.redirect_stdout(io.StringIO()):
        training = launch.setup(options.parse(argv, AGENTS), AGENTS, Stop())
    with training.resources:
        one_line(lambda: checkpoint.restore(training.saver.parts, [state]))


# --- Data -------------------------------------------------------------------------------------------------------------


KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "infos/more", "next_observations")
ARRAYS = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from(["f2", "f4", "f8", "i1", "i8", "?", "S3", "c8"]),
        st.lists(st.integers(0, 40), max_size=3),
        st.sampled_from([0.0, 0.5, 2.0, -1.0, np.nan, np.inf, 1e38]),
    ),
)


@fuzz
@given(st.dictionaries(st.sampled_from(KEYS), ARRAYS, max_size=4), st.integers(1, 40), st.integers(0, 10**6))
def test_any_hdf5_file(tmp_path: Path, changes: dict[str, Any], rows: int, cut: int) -> None:
    """Keys missing, too many, of another type, length or dimension, not finite, out of the box; files cut anywhere."""
    path = d4rl_file(tmp_path / "any.hdf5", rows=rows)
    with h5py.File(path, "a") as file:
        for key, change in changes.items():
            if key in file:
                del file[key]
            if change is not None:
                kind, shape, value = change
                text = kind.startswith("S")
                with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
                    file[key] = np.full(shape, b"x" if text else np.asarray(value).astype(kind), kind)
    if cut < path.stat().st_size:
        path.write_bytes(path.read_bytes()[:cut])
    loaded: list[Any] = []
    if one_line(lambda: loaded.append(d4rl.load("hopper-medium-v2", path))):
        dataset = loaded[0]
        for name in ("states", "actions", "rewards", "next_states", "not_dones"):
            assert np.isfinite(getattr(dataset, name)).all() and len(getattr(dataset, name)) == dataset.size > 0
        assert np.abs(dataset.actions).max() <= 1.0001


def test_every_algorithm_has_a_fuzzed_command_line() -> None:
    assert set(hyperparameters.CONFIGS) == set(AGENTS) and len(FLAGS) > 60


pytestmark = pytest.mark.slow  # the whole file: seconds per test
