"""What a result says of the code that made it."""

import shutil
import subprocess

import pytest

from bitswitch import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="it asks git")
def test_the_commit_is_that_of_our_own_checkout(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "theirs.py").touch()
    (tmp_path / "machine.py").touch()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.source_commit() is None
    git("init")
    git("add", "theirs.py")
    git("commit", "-m", "theirs")
    # As an installed package is, in an environment that lies in somebody's repository.
    assert machine.source_commit() is None
    git("add", "machine.py")
    git("commit", "-m", "ours")
    assert machine.source_commit() == git("rev-parse", "HEAD")
    (tmp_path / "machine.py").write_text("changed")
    assert machine.source_commit() == git("rev-parse", "HEAD") + "+changes"
