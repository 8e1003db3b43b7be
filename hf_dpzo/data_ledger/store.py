"""The file of a ledger: SQLite with a write-ahead log, which several processes share and which survives a kill.

Each look and each entry opens the file anew and closes it, so that it may be moved while a run goes on.
"""

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from hf_dpzo.data_ledger.place import DataLedgerError


# What SQLite keeps in the header of a file, to tell programs and versions apart: "DPZO", and the layout below.
APPLICATION, LAYOUT = 0x44505A4F, 1


_TABLES = (
    "CREATE TABLE ledger (name TEXT PRIMARY KEY, value)",
    "CREATE TABLE budgets (id INTEGER PRIMARY KEY AUTOINCREMENT, set_at TEXT, epsilon REAL, delta REAL, seal BLOB)",
    "CREATE TABLE data_sets (id INTEGER PRIMARY KEY AUTOINCREMENT, identity BLOB UNIQUE, form BLOB, members BLOB)",
    "CREATE TABLE runs (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, entered_at TEXT, changed_at TEXT, "
    "state TEXT, plan TEXT, data_set INTEGER, steps INTEGER, checksum TEXT, seal BLOB)",
)


# What every file of SQLite begins with.
_BEGINNING = b"SQLite format 3\x00"


# How long a process waits for another one, which holds the file for some milliseconds, in seconds.
_PATIENCE = 60.0


class Store:
    """The file of a ledger.

    Args:
        path: its path.
        create: whether to make it if it is not there.

    Raises:
        DataLedgerError: there is no such file, or it is damaged, no ledger, or cannot be written.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        if create:
            self._create()
        elif not path.is_file():
            raise DataLedgerError(f"privacy_ledger={path}: there is no such ledger; name the one that runs were given.")

    def _create(self) -> None:
        try:
            # For this user alone, also the files that SQLite puts beside it.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600))
        except FileExistsError:
            pass
        except OSError as error:
            raise self._build_write_error(error.strerror) from error
        with self._explained(), closing(self._connect(writable=self._is_writable)) as connection:
            if not _is_empty(connection):
                self._hide()
                return
        with self.writing() as connection:
            if not _is_empty(connection):
                return
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {LAYOUT}")
            for statement in _TABLES:
                connection.execute(statement)
            values = {"key": secrets.token_bytes(32), "identity": secrets.token_hex(16), "revision": 0}
            connection.executemany("INSERT INTO ledger VALUES (?, ?)", values.items())

    def _hide(self) -> None:
        """Leave the ledger to its owner alone, such as after it was copied."""
        found = self.path.stat()
        if found.st_mode & 0o077 and os.name != "nt" and found.st_uid == os.getuid() and self._is_writable:
            self.path.chmod(0o600)

    @property
    def _is_writable(self) -> bool:
        return os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Open the file as it is now, for reading alone. It may lie where this user may not write."""
        with self._explained(), closing(self._connect(writable=self._is_writable)) as connection:
            connection.execute("BEGIN")
            self._check(connection)
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open the file and hold it alone. What is written is on disk after the block, or nothing of it is."""
        with self._explained():
            if self.path.is_file() and not self._is_writable:
                raise self._build_write_error("it is read-only for this user")
            with closing(self._connect(writable=True)) as connection:
                self._use_write_ahead_log(connection)
                connection.execute("BEGIN IMMEDIATE")
                try:
                    self._check(connection, may_be_empty=True)
                    yield connection
                    connection.execute("UPDATE ledger SET value = value + 1 WHERE name = 'revision'")
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def _connect(self, *, writable: bool) -> sqlite3.Connection:
        if not self.path.is_file():
            raise DataLedgerError(
                f"privacy_ledger={self.path}: it is not there any more; put it back, or name where it is now."
            )
        mode = "mode=rw"
        if not writable:
            if self.path.with_name(f"{self.path.name}-wal").exists():
                raise self._build_write_error("a process was killed while it wrote, and what it wrote is beside it")
            mode = "mode=ro&immutable=1"
        uri = f"{self.path.resolve().as_uri()}?{mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _use_write_ahead_log(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:  # SQLite does not wait here for another process.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise self._build_write_error("its file system has no shared memory, as on a network")

    def _check(self, connection: sqlite3.Connection, *, may_be_empty: bool = False) -> None:
        """Raise `DataLedgerError` unless the file is a whole ledger of this layout."""
        if _is_empty(connection):
            if may_be_empty:
                return
            raise DataLedgerError(f"privacy_ledger={self.path}: it is an empty file, and no ledger; name another one.")
        ((application,), (layout,)) = (
            connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application != APPLICATION:
            raise DataLedgerError(f"privacy_ledger={self.path}: it is a file of another program; name another one.")
        if layout > LAYOUT:
            raise DataLedgerError(
                f"privacy_ledger={self.path}: a newer version wrote it; use that version of hf_dpzo, or a later one."
            )
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise self.build_damage("SQLite finds a fault in it")

    def build_damage(self, what: str) -> DataLedgerError:
        """Return the error for a ledger that is not as it was written."""
        return DataLedgerError(
            f"privacy_ledger={self.path}: it is damaged, or no ledger ({what}), and what was spent is not known; bring "
            "it back from a copy, and add the runs that came after it by hf-dpzo ledger --add."
        )

    def _build_write_error(self, reason: str) -> DataLedgerError:
        return DataLedgerError(
            f"privacy_ledger={self.path}: it can not be written ({reason}); put it on a local disk, into a folder that "
            "this user may write to."
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of SQLite inside the context into one sentence each."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                raise DataLedgerError(
                    f"privacy_ledger={self.path}: another process has held it for {_PATIENCE:g} seconds; wait until "
                    "that one has ended."
                ) from error
            if "no such table" in text or "no such column" in text:
                raise self.build_damage(text) from error
            raise self._build_write_error(text) from error
        except sqlite3.DatabaseError as error:
            if _BEGINNING.startswith(self.path.read_bytes()[: len(_BEGINNING)]):
                raise self.build_damage(str(error)) from error
            raise DataLedgerError(
                f"privacy_ledger={self.path}: it is no ledger, and stays as it is; name the one that runs were given, "
                "or bring it back from a copy if this is what became of it."
            ) from None


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Return whether nothing was written yet, such as by a process that was killed when it made the file."""
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
