"""Writing files: a fault of the storage or a kill leaves what was there before."""

import errno
import os
import stat

import pytest
import tiny

from vnca.program import VncaError, files


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(file):
    file.write(b"half")
    full()


@pytest.mark.parametrize("step", ["save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_file_before_it_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"before")
    save = half_written if step == "save" else lambda file: file.write(b"after")
    if step != "save":
        monkeypatch.setattr(files.os, step.removeprefix("os."), full)
    with pytest.raises(VncaError) as fault:
        files.write(path, save)
    assert tiny.one_line(fault, path, "No space left on device", "--workdir")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_storage_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", sync_files_only)
    files.write_json(tmp_path / "file.json", [1, float("nan")], indent=None)
    assert (tmp_path / "file.json").read_text() == "[1, null]\n"


def test_storage_without_modes_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "chmod", refuse)
    files.write(tmp_path / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_the_folder_is_synced_after_the_rename_and_its_fault_is_told(tmp_path, monkeypatch):
    path, there = tmp_path / "file", []

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            there.append(path.read_bytes())
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(VncaError, match="Input/output error; repair the storage"):
        files.write(path, lambda file: file.write(b"whole"))
    assert there == [b"whole"]


def test_a_written_file_has_the_mode_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o077)
    try:
        files.write(tmp_path / "file", lambda file: file.write(b"whole"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_link_stays_and_its_file_is_written(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "metrics.jsonl"
    disk.mkdir()
    link.symlink_to(disk / "metrics.jsonl")
    for content in (b"one", b"two"):
        files.write(link, lambda file, content=content: file.write(content))
        assert link.is_symlink() and (disk / "metrics.jsonl").read_bytes() == content


def test_an_interrupted_write_leaves_the_file_before_it_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"before")

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(path, interrupted)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"


def test_what_a_killed_write_left_behind_is_cleaned_up_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"whole")

    class Kill(BaseException):
        pass

    def killed(file):
        os.link(file.name, tmp_path / "second name")  # for the write removes the first
        (tmp_path / "name").write_text(file.name)
        raise Kill

    with pytest.raises(Kill):
        files.write(tmp_path / "samples.png", killed)
    left = tmp_path / "second name"
    left = left.rename((tmp_path / "name").read_text())
    others = {".evaluation.json.abcd_123.tmp", ".study.json.abcd_123.tmp"}  # may be in use
    others |= {".notes.tmp", ".draft.12345678.txt.tmp", ".a.b.ABCDEFGH.tmp"}  # of the user
    for name in others:
        (tmp_path / name).touch()
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "name", left.name, *others}
    files.clean(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "name", *others}


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOENT, "moved or removed"),
        (errno.EACCES, "permission to write"),
        (errno.ENOSPC, "make room"),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_a_write_that_fails_is_told_what_helps(tmp_path, monkeypatch, code, remedy):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(VncaError, match=f"{os.strerror(code)}.*{remedy}") as fault:
        files.write(tmp_path / "file", lambda file: None)
    assert ("make room" in str(fault.value)) == (code == errno.ENOSPC)
