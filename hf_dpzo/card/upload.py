"""Uploads to the Hub, of public files and nothing else."""

import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, run_as_future

from hf_dpzo.card.files import CARD_FILE, STALE_PATTERNS, STATEMENT_FILE, is_public_file
from hf_dpzo.io.files import read_plain, replace_all
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE
from hf_dpzo.trajectory.parts import PARTS_FILE


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The destination of an upload.

    Args:
        repository: the repository on the Hub.
        revision: the branch; `None` for the main one.
        token: a token that may write there; `None` for the one that this machine has stored.
    """

    repository: str
    revision: str | None = None
    token: str | None = None


class Snapshot:
    """A temporary folder that does not change while it is uploaded.

    Args:
        within: the folder of the run, in which the snapshot is created.
    """

    def __init__(self, within: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(dir=within, prefix="_push-")
        self.folder = Path(self._scratch.name)

    def upload(self, destination: Destination, *, message: str, wait: bool) -> CommitInfo | Future:
        """Upload the public files in one commit, which also deletes an earlier model's files; then delete the snapshot.

        Args:
            destination: the destination of the upload.
            message: the message of the commit.
            wait: whether to wait for the upload; otherwise return a future.

        Raises:
            RuntimeError: the card, the statement or the log is missing.
        """
        missing = [name for name in (CARD_FILE, STATEMENT_FILE, LOG_FILE) if not (self.folder / name).is_file()]
        if missing:
            raise RuntimeError(f"{', '.join(missing)}: weights are not uploaded without; write the card first.")
        for path in self.folder.iterdir():
            if not is_public_file(path):
                path.unlink()
        if wait:
            return self._commit(destination, message)
        return run_as_future(self._commit, destination, message)  # Futures run one after the other.

    def _commit(self, destination: Destination, message: str) -> CommitInfo:
        with self._scratch:
            # upload_folder may make several commits, and the first could hold weights without the rest.
            api = HfApi(token=destination.token)
            ours = {path.name: path for path in self.folder.iterdir()}
            info = api.model_info(destination.repository, revision=destination.revision)
            others = [file.rfilename for file in info.siblings if file.rfilename not in ours]
            stale = [name for name in others if any(Path(name).match(pattern) for pattern in STALE_PATTERNS)]
            operations = [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(ours.items())),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ]
            return api.create_commit(
                destination.repository,
                operations,
                commit_message=message,
                revision=destination.revision,
                parent_commit=info.sha,
            )


def copy_log(source: Path, folder: Path, *, durably: bool = True) -> None:
    """Copy the log in `source`, with its initial values and its parts if there are any, into `folder`.

    Raises:
        LinkError: one of them is a link, and could lead to any file of this machine.
    """
    if source.resolve() == folder.resolve():
        return
    names = [name for name in (LOG_FILE, INITIAL_FILE, PARTS_FILE) if os.path.lexists(source / name)]
    if PARTS_FILE not in names:
        (folder / PARTS_FILE).unlink(missing_ok=True)  # Of another run.
    replace_all({folder / name: read_plain(source / name) for name in names}, durably=durably)
