"""Files of strangers: none is opened before its size is known, and what is no text or JSON gets one sentence."""

import os

import pytest
from huggingface_hub import create_repo

from hf_dpzo.card.sources import MAX_TEXT_BYTES, HubCommit, LocalFolder, SourceError, open_source


@pytest.fixture(params=["folder", "hub"])
def make(request, tmp_path, monkeypatch):
    """Makes a source of these files."""

    def source(files: dict[str, bytes]):
        if request.param == "folder":
            for name, data in files.items():
                (tmp_path / name).write_bytes(data)
            return open_source(tmp_path)
        there = request.getfixturevalue("hub")
        create_repo("tester/x", exist_ok=True)
        for name, data in files.items():
            there.edit("tester/x", name, data)
        return open_source("tester/x")

    return source


def test_files_of_a_source_have_sizes_and_contents(make):
    source = make({"a.json": b'{"b": [1]}', "c.txt": b"hello"})
    assert {name: source.sizes[name] for name in ("a.json", "c.txt")} == {"a.json": 10, "c.txt": 5}
    assert (source.read_json("a.json"), source.read_text("c.txt")) == ({"b": [1]}, "hello")
    folder = source.fetch({"a.json": 10, "c.txt": 5})
    assert (folder / "a.json").read_bytes() == b'{"b": [1]}' and (folder / "c.txt").is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x" * (MAX_TEXT_BYTES + 1), "it has 1048577 bytes, and may have 1048576; it is not opened"),
        (b"\xff", "it is no text"),
        (b"{", "it is not valid JSON"),
        (b"[" * 200_000, "it is not valid JSON"),
        (b"NaN", "NaN is no number"),
        (b"1" * 5000, "it is not valid JSON"),
    ],
    ids=["large", "bytes", "cut", "deep", "nan", "long number"],
)
def test_unreadable_files_get_one_sentence(make, data, message):
    with pytest.raises(SourceError, match=message) as caught:
        make({"a.json": data}).read_json("a.json")
    assert len(str(caught.value)) < 250


def test_a_missing_file_is_reported(make):
    with pytest.raises(SourceError, match="b: there is no such file"):
        make({"a": b""}).fetch({"b": 1})


def test_a_file_that_grew_since_it_was_listed_is_not_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    source = LocalFolder(tmp_path)
    (tmp_path / "a").write_bytes(b"x" * 100)
    with pytest.raises(SourceError, match="it has 100 bytes, and may have 10"):
        source.fetch({"a": 10})


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert LocalFolder(tmp_path).sizes == {}


def test_a_repository_is_read_at_one_commit(hub):
    create_repo("tester/x")
    for name in ("a", "b"):
        hub.edit("tester/x", name, b"first")
    source = HubCommit("tester/x")
    hub.edit("tester/x", "b", b"second")
    assert (source.read_text("a"), source.read_text("b")) == ("first", "first")


@pytest.mark.parametrize("name", ["a b", "../x", "tester/nothing", "a/b/c"])
def test_what_is_nowhere_gets_one_sentence(hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as caught:
        open_source(name)
    assert "\n" not in str(caught.value)
