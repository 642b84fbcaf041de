"""What TensorBoard and a reader of CSV files find, also after a run was killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from tests.runs.test_full_disk import files_end_at
from utils.errors import UserError
from utils.runs.log import CsvFile, SeedLog
from utils.runs.reading import read_metrics

SETTINGS = {"tau": 0.005, "lr_decay": False, "reward_tune": "no", "batch_size": 256, "top_k": None}


def log(folder: Path, step: int, until: int) -> None:
    """Epochs of ten steps after `step`, an evaluation each."""
    written = SeedLog(folder, ("critic_loss",), step, SETTINGS)
    for now in range(step + 10, until + 1, 10):
        written.metrics(now, {"critic_loss": now / 8}, 100.0)
        written.evaluation(now, (1.0, 3.0), (float(now), now + 2.0), (5, 5), (False, False))
    written.close()


def test_the_settings_and_the_last_score_are_in_hparams(tmp_path: Path) -> None:
    log(tmp_path, 0, 30)
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == ["evaluations", "events", "metrics"]
    events = EventAccumulator(str(tmp_path)).Reload()
    plugin = {tag: content for tag, content in events.summary_metadata.items() if "_hparams_" in tag}
    contents = {tag: value.plugin_data.content for tag, value in plugin.items()}
    start = metadata.parse_session_start_info_plugin_data(contents["_hparams_/session_start_info"])
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert shown == {**SETTINGS, "top_k": "None"}
    experiment = metadata.parse_experiment_plugin_data(contents["_hparams_/experiment"])
    (metric,) = (info.name.tag for info in experiment.metric_infos)
    assert [(event.step, event.value) for event in events.Scalars(metric)] == [(10, 11.0), (20, 21.0), (30, 31.0)]
    assert [event.value for event in events.Scalars("losses/critic_loss")] == [1.25, 2.5, 3.75]


def test_what_a_killed_process_wrote_beyond_its_checkpoint_is_dropped(tmp_path: Path) -> None:
    log(tmp_path, 0, 40)
    log(tmp_path, 20, 30)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("losses/critic_loss")] == [10, 20, 30]


def test_half_an_event_does_not_hide_those_after_it(tmp_path: Path) -> None:
    log(tmp_path, 0, 20)
    (path,) = tmp_path.glob("events*")
    path.write_bytes(path.read_bytes()[:-5])
    log(tmp_path, 10, 20)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("losses/critic_loss")] == [1.25, 2.5]


def test_rows_are_appended_and_another_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"step,loss\r\n1,2\r\n")
    file = CsvFile(tmp_path / "a.csv", ("step", "loss"))
    file.rows([{"step": 2, "loss": 3}])
    assert file.sync() == len(b"step,loss\r\n1,2\r\n2,3\r\n")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.rows([{"step": 3}])
    with pytest.raises(UserError, match=r"a.csv has other columns \(step, loss\) than this version writes"):
        CsvFile(tmp_path / "a.csv", ("step", "event"))
    assert (tmp_path / "a.csv").read_bytes() == b"step,loss\r\n1,2\r\n2,3\r\n"


def test_a_file_of_an_earlier_version_goes_on_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"step,loss\r\n1,2\r\n")
    file = CsvFile(tmp_path / "a.csv", ("step", "new", "loss"))
    file.rows([{"step": 2, "new": 7, "loss": 3}])
    file.close()
    assert (tmp_path / "a.csv").read_bytes() == b"step,loss\r\n1,2\r\n2,3\r\n"


def test_a_disk_that_refuses_events_costs_one_warning_and_no_row(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The CSV files are the record. Here no file of the process may grow beyond 4 kB, and events are the first."""
    with (
        files_end_at(4000),
        pytest.warns(UserWarning, match=r"no more TensorBoard events of .*: .*File too large") as seen,
    ):
        written = SeedLog(tmp_path, ("critic_loss",), 0, SETTINGS)
        for now in range(1, 101):
            written.metrics(now, {"critic_loss": now / 8}, 100.0)
        lengths = written.sync()
        written.close()
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert len(read_metrics(tmp_path / "metrics.csv")["step"]) == 100
    assert lengths["metrics.csv"] == (tmp_path / "metrics.csv").stat().st_size < 4000
    assert capfd.readouterr().err == ""
