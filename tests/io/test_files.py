"""Files: written whole or not at all, and never through a link; and what parsers of other libraries raise."""

import os
from pathlib import Path

import pytest

from hf_dpzo.io import files
from hf_dpzo.io.files import LinkError, is_scratch_file, open_plain, read_plain, refuse_links_in, replace_all
from hf_dpzo.io.foreign import one_sentence
from hf_dpzo.io.strict_json import find_fault, parse_json


@pytest.fixture
def readers_own(tmp_path) -> Path:
    """A file of the reader's, that a link could lead to."""
    path = tmp_path / "notes.txt"
    path.write_text("the reader's own")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(folder, readers_own):
    (folder / "README.md").symlink_to(readers_own)
    replace_all({folder / "README.md": b"new"})
    assert (folder / "README.md").read_bytes() == b"new" and not (folder / "README.md").is_symlink()
    assert readers_own.read_text() == "the reader's own"


@pytest.mark.parametrize("name", ["README.md.new", ".README.md.new", "README.md.tmp"])
def test_links_that_wait_for_a_scratch_file_are_not_followed(folder, readers_own, name):
    (folder / name).symlink_to(readers_own)
    replace_all({folder / "README.md": b"new"})
    assert readers_own.read_text() == "the reader's own" and (folder / name).is_symlink()


def test_a_scratch_file_that_is_there_already_is_not_written_over(folder, readers_own, monkeypatch):
    """Even where a stranger could guess its name."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    planted = folder / f".README.md.{32 * '0'}.new"
    planted.symlink_to(readers_own)
    with pytest.raises(FileExistsError):
        replace_all({folder / "README.md": b"new"})
    assert readers_own.read_text() == "the reader's own"


def test_scratch_files_have_fresh_names_and_are_gone_after_an_error(folder, monkeypatch):
    seen = []

    def fail(paths):
        seen.extend(path.name for path in paths)
        raise OSError("no room")

    monkeypatch.setattr(files, "sync_all", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no room"):
            replace_all({folder / "a": b"1", folder / "b": b"2"})
    assert len(set(seen)) == 4 and all(map(is_scratch_file, seen)) and not list(folder.iterdir())


def test_files_have_the_mode_that_the_umask_gives_them(folder):
    before = os.umask(0o027)
    try:
        replace_all({folder / "a": b""})
    finally:
        os.umask(before)
    assert (folder / "a").stat().st_mode & 0o777 == 0o640


def test_links_and_pipes_are_not_read(folder, readers_own):
    (folder / "link").symlink_to(readers_own)
    (folder / "nowhere").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe")
    for name, message in (("link", "it is a link"), ("nowhere", "it is a link"), ("pipe", "it is no plain file")):
        with pytest.raises(LinkError, match=message):
            read_plain(folder / name)
    with pytest.raises(LinkError, match="it is a link"):
        open_plain(folder / "link", writable=True)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-3", "runs", "trajectory.zo.lock", "config.json"])
def test_links_that_a_save_would_follow_are_refused(folder, readers_own, name):
    (folder / name).symlink_to(readers_own)
    with pytest.raises(LinkError, match=f"{name}: it is a link"):
        refuse_links_in(folder)


def test_links_that_no_save_follows_are_let_be(folder, tmp_path):
    (folder / "latest").symlink_to(tmp_path)
    refuse_links_in(folder)


@pytest.mark.parametrize("text", ["1" * 400, "1e999", "-1e999", '{"a": [1e400]}'])
def test_numbers_beyond_float64_are_no_json(text):
    with pytest.raises(ValueError, match=r"digits|too large"):
        parse_json(text)


def test_a_pattern_of_a_schema_ends_where_the_text_ends():
    """For Python, `$` is also before a last line break."""
    fault = find_fault({"LORA": {"modules_to_save": ["score\n"]}}, "adapters.json")
    assert fault is not None and find_fault({"LORA": {"modules_to_save": ["score"]}}, "adapters.json") is None


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "error", [KeyError("\x1b[2J"), IndexError(), AttributeError("a\nb"), RecursionError(), MemoryError(), Unspeakable()]
)
def test_every_error_of_a_parser_is_one_sentence(error):
    with (
        pytest.raises(ValueError, match="x: it cannot be read") as caught,
        one_sentence("x: it cannot be read", ValueError, remedy="y"),
    ):
        raise error
    said = str(caught.value)
    assert said.isascii() and said.isprintable() and said.endswith("; y.") and len(said) < 200
