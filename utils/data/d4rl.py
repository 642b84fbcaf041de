"""D4RL's datasets without d4rl: from its cache, downloaded to it, or any file of its format, as a `Dataset`."""

from __future__ import annotations

import os
from pathlib import Path

from utils.data.dataset import Dataset
from utils.data.download import download
from utils.data.rows import (
    check_values,
    episode_ends,
    episode_returns,
    open_unchanged,
    qlearning_transitions,
    read_rows,
    sha256_of,
)
from utils.errors import UserError
from utils.tasks import Task, normalized_score, task


def cache_folder() -> Path:
    """Where d4rl keeps its files, so that existing caches serve: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


def cached_file(env_name: str) -> Path:
    """Where the file of `env_name` lies or would lie."""
    return cache_folder() / task(env_name).file_name


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal; UserError where it cannot be read."""
    with open_unchanged(path) as file:
        return sha256_of(file)


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _verify_checksum(path: Path, digest: str) -> None:
    """Compare with the SHA-256 kept beside the file when it was first downloaded, where there is one."""
    kept = _checksum_file(path)
    if not kept.exists():
        return
    words = kept.read_text(errors="replace").split()
    if not words or words[0].lower() != digest:
        raise UserError(
            f"{path} has SHA-256 {digest}, not the one kept in {kept.name}: the file changed since it "
            "was first downloaded; delete both to download it again, or restore the file"
        )


def _download(wanted: Task, target: Path) -> None:
    """Fetch D4RL's file to `target`, which appears only once it has been read and found good."""

    def check(part: Path) -> None:
        with open_unchanged(part) as opened:
            rows = read_rows(part, wanted.state_dim, wanted.action_dim, opened)
            check_values(rows, part)
            qlearning_transitions(rows, wanted.max_episode_steps)
            digest = sha256_of(opened)
        kept = _checksum_file(target)
        if not kept.exists():
            kept.write_text(f"{digest}  {target.name}\n")
        elif kept.read_text(errors="replace").split()[:1] != [digest]:
            raise UserError(
                f"the server's file has SHA-256 {digest}, not the first download's, kept in {kept}; "
                f"delete {kept.name} to accept the new one"
            )

    try:
        download(wanted.url, target, check)
    except UserError as error:
        raise UserError(
            f"{wanted.env_name}: no file {target}, and it cannot be downloaded ({error}); put the file "
            "there, or name one with --dataset PATH, or train on data collected here with --dataset local"
        ) from error


def load(env_name: str, path: str | os.PathLike[str] | None = None, verify: bool = True) -> Dataset:
    """The transitions that d4rl's `qlearning_dataset` makes of a D4RL-format file, before reward tuning.

    Without `path` the file is d4rl's own: from its cache, else downloaded to it. `verify` compares it with
    the SHA-256 kept beside it, where there is one. Another set is never taken instead.
    Raises UserError for an unknown id, and for a file that is not sound, or missing and not to be downloaded.
    """
    wanted = task(env_name)
    file = cached_file(env_name) if path is None else Path(os.path.expanduser(path))
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
    return Dataset(**arrays, env_name=env_name, source="d4rl" if path is None else str(path), info=info)
