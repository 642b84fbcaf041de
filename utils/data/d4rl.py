"""D4RL's datasets without d4rl: from its cache, downloaded to it, or any file of its format, as a `Dataset`."""

from __future__ import annotations

import os
import shlex
import warnings
from functools import partial
from pathlib import Path

from utils.data.dataset import Dataset
from utils.data.doubts import doubts
from utils.data.download import download
from utils.data.rows import (
    Rows,
    check_values,
    episode_ends,
    episode_returns,
    open_unchanged,
    qlearning_transitions,
    read_rows,
    sha256_of,
)
from utils.errors import UserError
from utils.files import atomic_write
from utils.tasks import Task, normalized_score, task


def cache_folder() -> Path:
    """Where d4rl keeps its files, so that existing caches serve: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


def cached_file(env_name: str) -> Path:
    """Where the file of `env_name` lies or would lie."""
    return cache_folder() / task(env_name).file_name


def find_file(folder: Path, env_name: str) -> Path:
    """A task's file in a folder: as the task is called, with or without its version, or as D4RL calls it.

    Raises UserError where there is none.
    """
    names = [f"{env_name}.hdf5", f"{env_name.rpartition('-v')[0]}.hdf5", task(env_name).file_name]
    for name in names:
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise UserError(f"no data for {env_name} in {folder}: no {' or '.join(names)}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal; UserError where it cannot be read."""
    with open_unchanged(path) as file:
        return sha256_of(file)


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _kept_checksum(path: Path) -> str | None:
    """The SHA-256 kept beside a file; None where there is none, or an empty one (a full disk left such)."""
    kept = _checksum_file(path)
    words = kept.read_text(errors="replace").split() if kept.exists() else []
    return words[0].lower() if words else None


def _verify_checksum(path: Path, digest: str) -> None:
    """Compare with the SHA-256 kept beside the file when it was first downloaded, where there is one."""
    kept = _kept_checksum(path)
    if kept not in (None, digest):
        raise UserError(
            f"{path} has SHA-256 {digest}, not the one kept in {_checksum_file(path).name}: the file changed since it "
            "was first downloaded; delete both to download it again, or restore the file"
        )


def address(wanted: Task) -> str:
    """Where the file is fetched from: D4RL's server, or $D4RL_DATASET_URL, a folder of files with d4rl's names."""
    mirror = os.environ.get("D4RL_DATASET_URL")
    if not mirror:
        return wanted.url
    if not mirror.startswith(("http://", "https://")):
        raise UserError(f"$D4RL_DATASET_URL is {mirror!r}; it must begin with http:// or https://")
    return f"{mirror.rstrip('/')}/{wanted.file_name}"


def _download(wanted: Task, target: Path) -> None:
    """Fetch D4RL's file to `target`, which appears only once it has been read and found good."""

    def check(part: Path) -> None:
        with open_unchanged(part) as opened:
            rows = read_rows(part, wanted.state_dim, wanted.action_dim, opened)
            check_values(rows, part)
            qlearning_transitions(rows, wanted.max_episode_steps)
            digest = sha256_of(opened)
        kept = _kept_checksum(target)
        if kept is None:
            atomic_write(_checksum_file(target), f"{digest}  {target.name}\n")
        elif kept != digest:
            raise UserError(
                f"the server's file has SHA-256 {digest}, not the first download's, kept in {_checksum_file(target)}; "
                f"delete {_checksum_file(target).name} to accept the new one"
            )

    url, folder = address(wanted), target.parent
    if os.environ.get("D4RL_DATASET_DIR") and not folder.is_dir():
        raise UserError(
            f"{wanted.env_name}: no file {target}: $D4RL_DATASET_DIR names a folder that is not there; correct it, or "
            f"make the folder (mkdir -p {shlex.quote(str(folder))}), or name a file with --dataset PATH"
        )
    try:
        download(url, target, check)
    except UserError as error:
        here = ", or train on data collected here with --dataset local" if wanted.collectable else ""
        raise UserError(
            f"{wanted.env_name}: no file {target}, and it cannot be downloaded ({error}). Fetch it on a machine that "
            f"can (wget -P {shlex.quote(str(folder))} {shlex.quote(url)}), or name a mirror with $D4RL_DATASET_URL, "
            f"the folder that has it with $D4RL_DATASET_DIR or the file with --dataset PATH{here}"
        ) from error


def load(env_name: str, path: str | os.PathLike[str] | None = None, verify: bool = True) -> Dataset:
    """The transitions that d4rl's `qlearning_dataset` makes of a D4RL-format file, before reward tuning.

    Without `path` the file is d4rl's own: from its cache, else downloaded to it; in a folder it is the task's
    (`find_file`). What speaks against its being the task's data (`doubts`) is warned of. `verify` compares it with
    the SHA-256 kept beside it, where there is one. Another set is never taken instead.
    Raises UserError for an unknown id, and for a file that is not sound, or missing and not to be downloaded.
    """
    wanted = task(env_name)
    file = cached_file(env_name) if path is None else Path(os.path.expanduser(path))
    if path is not None and os.path.isdir(file):
        file = find_file(file, env_name)
    if not os.path.exists(file):  # also where its name is none that the system takes
        if path is not None:
            raise UserError(f"no dataset file {file}; give the path of a D4RL-format HDF5 file")
        _download(wanted, file)
    with open_unchanged(file) as opened:
        digest = sha256_of(opened)
        if verify:
            _verify_checksum(file, digest)
        size = os.fstat(opened.fileno()).st_size
        rows = read_rows(file, wanted.state_dim, wanted.action_dim, opened)
    check_values(rows, file)
    for doubt in doubts(rows, wanted, file):
        warnings.warn(f"{file}: {doubt}", stacklevel=2)
    returns = episode_returns(rows, episode_ends(rows, wanted.max_episode_steps))
    info = {
        "path": str(file.resolve()),
        "bytes": size,
        "sha256": digest,
        "rows": len(rows.rewards),
        "episodes": len(returns),
        "behaviour_score": float(normalized_score(env_name, returns.mean())),
    }
    arrays = qlearning_transitions(rows, wanted.max_episode_steps, name=file)
    return Dataset(
        **arrays,
        env_name=env_name,
        source="d4rl" if path is None else str(file),
        info=info,
        raw=partial(_rows_again, file, wanted, digest),
    )


def _rows_again(file: Path, wanted: Task, digest: str) -> Rows:
    """The recorded rows, read once more. Raises UserError where the file is not the one that was read before."""
    with open_unchanged(file) as opened:
        if sha256_of(opened) != digest:
            raise UserError(f"{file} was replaced while it was in use; run again")
        return read_rows(file, wanted.state_dim, wanted.action_dim, opened)
