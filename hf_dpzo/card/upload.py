"""What is uploaded to the Hub, and that nothing else is."""

import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, run_as_future

from hf_dpzo.card.files import CARD_FILE, STALE_PATTERNS, STATEMENT_FILE, is_public_file
from hf_dpzo.io.files import replace_all
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to upload to.

    Args:
        repository: on the Hub.
        revision: the branch; `None` for the main one.
        token: that may write there; `None` for the one of this machine.
    """

    repository: str
    revision: str | None = None
    token: str | None = None


class Snapshot:
    """A folder that nobody changes while it is uploaded.

    Args:
        within: the folder of the run, on whose disk it is made.
    """

    def __init__(self, within: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(dir=within, prefix="_push-")
        self.folder = Path(self._scratch.name)

    def upload(self, destination: Destination, *, message: str, wait: bool) -> CommitInfo | Future:
        """Upload all of it in one commit, which takes weights of other models away; then forget the snapshot.

        Raises:
            RuntimeError: there are weights without card, statement and log.
        """
        missing = [name for name in (CARD_FILE, STATEMENT_FILE, LOG_FILE) if not (self.folder / name).is_file()]
        if missing:
            raise RuntimeError(f"{', '.join(missing)}: weights are not uploaded without; write the card first.")
        for path in self.folder.iterdir():
            if not is_public_file(path):
                path.unlink()
        if wait:
            return self._commit(destination, message)
        return run_as_future(self._commit, destination, message)  # One after the other.

    def _commit(self, destination: Destination, message: str) -> CommitInfo:
        with self._scratch:
            # upload_folder may make several commits, of which the first would hold weights without the rest.
            api, ours = HfApi(token=destination.token), {path.name: path for path in self.folder.iterdir()}
            there = api.model_info(destination.repository, revision=destination.revision)
            names = [file.rfilename for file in there.siblings]
            stale = [
                name for name in names if name not in ours and any(Path(name).match(one) for one in STALE_PATTERNS)
            ]
            operations = [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(ours.items())),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ]
            return api.create_commit(
                destination.repository,
                operations,
                commit_message=message,
                revision=destination.revision,
                parent_commit=there.sha,
            )


def copy_log(source: Path, folder: Path, *, durably: bool = True) -> None:
    """Put a copy of the log in `source`, and of the initial values that belong to it, into `folder`."""
    if source.resolve() == folder.resolve():
        return
    there = [name for name in (LOG_FILE, INITIAL_FILE) if (source / name).is_file()]
    replace_all({folder / name: (source / name).read_bytes() for name in there}, durably=durably)
