import errno
import os
import stat
from pathlib import Path

import pytest

from bitswitch import files
from bitswitch.errors import UserError, nearest, require


def test_writes_whole(tmp_path):
    files.write(tmp_path / "deep" / "a", b"one")
    files.write(tmp_path / "deep" / "a", b"two")
    assert (tmp_path / "deep" / "a").read_bytes() == b"two"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "a"
    files.write(path, b"one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync" if step == "fsync" else "pathlib.Path.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        files.write(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.write(tmp_path / "file" / "a", b"")


def test_canonical_json_has_one_text():
    assert files.canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError):
        files.canonical_json(float("nan"))


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 8192
    (tmp_path / "a").write_bytes(content)
    assert files.file_digest(tmp_path / "a") == files.digest(content)


def test_a_missing_module_names_its_extra():
    with pytest.raises(UserError, match=r"bitswitch\[remote\]"):
        require("no_such_module_at_all", "remote")


def test_nearest():
    assert nearest("epoch", ["epochs", "lr"]) == "; did you mean 'epochs'?"
    assert nearest("zzz", ["epochs"]) == ""
    # To compare what a hostile file may hold would take hours.
    assert nearest("a" * 101, ["a" * 102]) == ""
    assert nearest("a" * 100, ["a" * 101, "a" * 90]) == f"; did you mean {'a' * 90!r}?"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("target")
    for content in (b"one", b"two"):
        files.write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_whose_a_file_is_stays(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    os.chown(tmp_path / "a", 12345, 23456)
    files.write(tmp_path / "a", b"two")
    found = (tmp_path / "a").stat()
    assert (found.st_uid, found.st_gid) == (12345, 23456)


def test_who_may_read_a_file_stays(tmp_path):
    (tmp_path / "own").write_bytes(b"one")
    (tmp_path / "own").chmod(0o600)
    files.write(tmp_path / "own", b"two")
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600 and (tmp_path / "own").read_bytes() == b"two"


def test_what_can_be_no_file_is_told_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("here").symlink_to("there")
    Path("there").symlink_to("here")
    for path in ("pipe", "here", "", ".", "/", "a\0b"):
        with pytest.raises(UserError, match="cannot write"):
            files.write(path, b"one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "pipe", "there"] and Path("pipe").is_fifo()


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85], ids=["ASCII", "UTF-8"])
def test_a_name_as_long_as_there_are_is_written(tmp_path, name):
    files.write(tmp_path / name, b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("path", ["s3://bucket/a", "memory:/a"])
def test_a_url_is_not_written(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a URL is read, not written"):
        files.write(path, b"one")
    files.write("odd:name", b"one")
    assert [p.name for p in tmp_path.iterdir()] == ["odd:name"]
