"""Where a ledger may lie: on a local disk, beside the data, and where nothing is published from."""

from pathlib import Path

import psutil

from hf_dpzo.card.files import PUBLIC_SUFFIXES
from hf_dpzo.io.files import LinkError, refuse_links
from hf_dpzo.trajectory.log import LOG_FILE


class DataLedgerError(ValueError):
    """A ledger that cannot be read or written, or does not fit a run. The message says how to go on."""


# Processes on several machines would write there, and the locks of SQLite's write-ahead log do not reach that far.
_NETWORKS = {
    *("nfs", "nfs4", "cifs", "smb3", "smb2", "smbfs", "afpfs", "afs", "webdav", "davfs", "sshfs", "ncpfs"),
    *("lustre", "beegfs", "gpfs", "ceph", "glusterfs", "orangefs", "pvfs2", "ocfs2", "gfs2"),
}


def refuse_place(path: Path, *, output_dir: Path | None = None) -> None:
    """Raise `DataLedgerError` where a ledger could be published, be lost with a model, or lose an entry.

    Args:
        path: the path of the ledger, which need not be there.
        output_dir: the folder of the run that is about to be entered.
    """
    try:
        refuse_links(path)
    except LinkError as error:
        raise DataLedgerError(f"privacy_ledger={error}") from None
    if (path / LOG_FILE).exists():
        raise DataLedgerError(
            f"privacy_ledger={path}: it is the folder of a run; name the file beside the data, which the run was "
            "given in privacy_ledger."
        )
    if path.is_dir():
        raise DataLedgerError(f"privacy_ledger={path}: it is a folder; name a file in it, such as {path}/data.ledger.")
    if path.suffix in PUBLIC_SUFFIXES:
        raise DataLedgerError(
            f"privacy_ledger={path}: files that end in {path.suffix} are published with models, and a ledger must not "
            "be; name it otherwise, such as data.ledger."
        )
    if not path.parent.is_dir():
        raise DataLedgerError(f"privacy_ledger={path}: there is no such folder; make it, or name another.")
    if output_dir is not None and output_dir.resolve() in path.resolve().parents:
        raise DataLedgerError(
            f"privacy_ledger={path}: it is in output_dir={output_dir}, and would be lost with one of the models that "
            "it counts; keep it beside the data."
        )
    network = find_network(path)
    if network is not None:
        raise DataLedgerError(
            f"privacy_ledger={path}: it is on a network ({network}), where entries of several processes can be lost; "
            "keep it on a disk of the machine that holds the data."
        )


def find_network(path: Path) -> str | None:
    """Return the kind of the network's file system that `path` lies on; `None` for a local one, or one not known."""
    if str(path).startswith("\\\\"):
        return "smb"
    folder = path.resolve().parent
    try:
        mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    except OSError:
        return None
    kind = next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "").lower()
    return kind if kind.removeprefix("fuse.") in _NETWORKS or _is_remote_fuse(kind) else None


def _is_remote_fuse(kind: str) -> bool:
    remote = ("s3fs", "gcsfuse", "rclone", "juicefs", "blobfuse", "goofys", "davfs", "mount-s3")
    return kind.startswith("fuse.") and any(name in kind for name in remote)
