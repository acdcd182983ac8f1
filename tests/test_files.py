"""Files that appear whole or not at all: what is refused, what is left, and what the next run makes of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from normswap import NormswapError
from normswap.files import TEMPORARY, check_output, clear, hidden_name, leftovers, locked, whole_file, whole_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, modes and locks")


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(NormswapError) as caught:
        check_output(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRefused:
    def test_what_is_no_place_for_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "dangling").symlink_to("nowhere/x.pt")
        os.mkfifo(tmp_path / "pipe.pt")
        assert "is a folder" in refusal(tmp_path)
        assert "is a file, not a folder" in refusal(tmp_path / "file" / "x.pt")
        assert "does not exist; create it first" in refusal(tmp_path / "nowhere" / "x.pt")
        assert "nowhere does not exist" in refusal(tmp_path / "dangling")
        assert "no regular file" in refusal(tmp_path / "pipe.pt", force=True)
        assert "name too long" in refusal(tmp_path / ("x" * 300)).lower()
        assert "loop" in refusal(tmp_path / "loop")
        assert "cannot be written" in refusal(tmp_path / "a\0b")

    def test_what_must_not_be_overwritten(self, tmp_path: Path) -> None:
        source = tmp_path / "in.pt"
        source.write_text("")
        (tmp_path / "hard.pt").hardlink_to(source)
        (tmp_path / "soft.pt").symlink_to(source)
        for name in ("in.pt", "hard.pt", "soft.pt"):
            assert "an input of this run" in refusal(tmp_path / name, force=True, inputs=[source])
        assert "--force" in refusal(source)
        check_output(source, force=True)
        source.chmod(0o444)
        for name in ("in.pt", "soft.pt"):
            assert "read-only" in refusal(tmp_path / name, force=True)

    def test_a_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # The tests may be run by root, who may do all.
        assert "must not be written to" in refusal(tmp_path / "x.pt")

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody can write")
    def test_a_folder_where_the_system_refuses(self) -> None:
        with pytest.raises(NormswapError, match=r"cannot write|must not be written"), whole_file("/proc/self/x.pt"):
            raise AssertionError


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestLeftovers:
    def test_they_are_removed_by_the_next_run(self, tmp_path: Path) -> None:
        hidden_name(tmp_path / "x.pt", "0123abcd").write_text("half")
        folder = hidden_name(tmp_path / "x.pt", "0123abce")
        folder.mkdir()
        (folder / "part").write_text("half")
        with whole_file(tmp_path / "x.pt") as file:
            assert file.name.startswith(".x.pt.")
            assert file.name.endswith(TEMPORARY)
            file.write_text("new")
        assert left(tmp_path) == ["x.pt"]

    def test_those_of_a_run_at_work_stay(self, tmp_path: Path) -> None:
        with whole_file(tmp_path / "x.pt") as file:
            file.write_text("mine")
            assert clear(tmp_path / "x.pt") == []
            with whole_file(tmp_path / "x.pt") as other:
                other.write_text("theirs")
            assert file.read_text() == "mine"
        assert left(tmp_path) == ["x.pt"]
        assert (tmp_path / "x.pt").read_text() == "mine"

    @pytest.mark.parametrize(
        "name",
        [".x.pt.0123abcd.tmp", ".x.pt.normswap.tmp", ".y.pt.0123abcd.normswap.tmp", ".x.pt.0123abcg.normswap.tmp"],
    )
    def test_other_files_stay(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("")
        assert leftovers(tmp_path / "x.pt") == []
        with whole_file(tmp_path / "x.pt") as file:
            file.write_text("new")
        assert left(tmp_path) == [name, "x.pt"]

    def test_files_set_aside_are_never_removed(self, tmp_path: Path) -> None:
        folder = hidden_name(tmp_path / "x.onnx", "0123abcd")
        (folder / "old").mkdir(parents=True)
        (folder / "old" / "x.onnx").write_text("the user's")
        with whole_files([tmp_path / "x.data", tmp_path / "x.onnx"]) as home:
            for name in ("x.data", "x.onnx"):
                (home / name).write_text("new")
        assert left(tmp_path) == [folder.name, "x.data", "x.onnx"]

    def test_long_names(self, tmp_path: Path) -> None:
        path = tmp_path / ("ä" * 120 + ".pt")
        with whole_file(path) as file:
            file.write_text("new")
            assert leftovers(path) == [file]
        assert left(tmp_path) == [path.name]

    def test_a_lock_is_held_once(self, tmp_path: Path) -> None:
        handle = locked(tmp_path)
        assert handle is not None
        with pytest.raises(BlockingIOError):
            locked(tmp_path)
        os.close(handle)
        again = locked(tmp_path)
        assert again is not None
        os.close(again)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_names_the_need(tmp_path: Path, number: int) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "x.pt", need=6_000_000_000) as file:
            file.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(NormswapError) as caught:
        fail()
    message = str(caught.value)
    assert f"cannot write {tmp_path / 'x.pt'}: {os.strerror(number)}" in message
    assert ("it takes 6.0 GB, and" in message) == (number != errno.EIO)
    assert message.endswith("No partial file was left")
    assert left(tmp_path) == []
