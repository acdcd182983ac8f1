"""Checkpoints written by copying: every value, dtype, stride and shared storage, the digest, and what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from normswap import NormswapError, plan_convert
from normswap.checkpoint import read, write
from normswap.checkpoints import transfer as transferring
from normswap.checkpoints.spans import Origin, Span, entries_of, mapped_at, number, storages_of
from normswap.checkpoints.torchfile import IDENTITY
from normswap.checkpoints.transfer import Piece, transfer
from normswap.checkpoints.writing import write_folder
from normswap.source import load_keys, load_source, save_source


def odd_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return {
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(3, 3, generator=generator).bfloat16(),
        "eighth": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "eighth5": torch.randn(2, generator=generator).to(torch.float8_e5m2),
        "complex": torch.randn(4, generator=generator, dtype=torch.complex64),
        "conjugate": torch.randn(4, generator=generator, dtype=torch.complex64).conj(),
        "truth": torch.tensor([True, False]),
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4),
        "whole": whole,
        "row": whole[2],
        "column": whole[:, 1],
        "turned": whole.t(),
        "again": whole,
        "last": torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
        "norm.weight": torch.randn(6, generator=generator),
        "norm.bias": torch.randn(6, generator=generator),
        "norm.running_mean": torch.randn(6, generator=generator),
        "norm.running_var": torch.rand(6, generator=generator) + 0.5,
        "norm.num_batches_tracked": torch.tensor(5),
    }


def bits(value: Tensor) -> Tensor:
    return value.resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def convert(source: Path, target: Path, to: str = "group", **options: Any) -> list[Path]:
    names = ("force", "max_shard_size", "resume", "progress")
    saving = {name: options.pop(name) for name in names if name in options}
    loaded = load_keys(source, to, **options)
    assert loaded.surgery is not None
    return save_source(loaded, loaded.model, loaded.surgery.plan.recipe, target, **saving)


def made(folder: Path, ending: str, state: dict[str, Tensor]) -> Path:
    path = folder / f"in{ending}"
    if ending == ".safetensors":
        write(path, state, metadata={"author": "me"})
    elif ending == ".legacy":
        for name in ("unsigned", "eighth", "eighth5"):
            del state[name]  # The old format has no such dtypes.
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif ending == ".ckpt":
        torch.save({"model": state, "epoch": 3, "beside": state["whole"]}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".ckpt", ".legacy"])
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out/"])
def test_every_value_and_dtype(tmp_path: Path, ending: str, output: str) -> None:
    state = odd_tensors()
    source = made(tmp_path, ending, state)
    before = source.read_bytes()
    convert(source, tmp_path / output)
    found = read(tmp_path / output).tensors
    kept = [name for name in state if "running" not in name and "num_batches" not in name]
    assert sorted(found) == sorted(kept)
    for name in kept:
        assert found[name].dtype == state[name].dtype, name
        assert torch.equal(bits(found[name]), bits(state[name])), name
    if output == "out.pt" and ending != ".safetensors":
        for name in kept:
            assert found[name].stride() == state[name].stride(), name
        places = {name: found[name].untyped_storage().data_ptr() for name in kept}
        assert len({places[name] for name in ("whole", "row", "column", "turned", "again")}) == 1
    if output == "out.pt":
        assert zipfile.ZipFile(tmp_path / output).testzip() is None
    assert source.read_bytes() == before


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_the_metadata_is_kept_and_extended(tmp_path: Path, ending: str) -> None:
    source = made(tmp_path, ending, odd_tensors())
    convert(source, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata.get("author") == ("me" if ending == ".safetensors" else None)
    (recipe,) = json.loads(metadata["normswap.recipe"])
    assert recipe["source"] == {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert load_file(tmp_path / "out.safetensors")["norm.weight"].shape == (6,)


def test_the_digest_of_shards_is_that_of_the_index_and_then_the_shards(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", odd_tensors(), max_shard_size=300)
    convert(tmp_path / "in", tmp_path / "out.safetensors")
    files = read(tmp_path / "in").files
    assert len(files) > 3
    (recipe,) = json.loads(read(tmp_path / "out.safetensors").metadata["normswap.recipe"])
    assert recipe["source"]["sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def archive_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return {
            info.filename: (info.CRC, info.header_offset, archive.read(info))
            for info in archive.infolist()
            if not info.filename.endswith(IDENTITY)
        }


def test_an_archive_is_what_torch_writes(tmp_path: Path) -> None:
    state = odd_tensors()
    with (tmp_path / "theirs.pt").open("wb") as file:
        torch.save(state, file)
    write(tmp_path / "ours.pt", state)
    assert archive_of(tmp_path / "ours.pt") == archive_of(tmp_path / "theirs.pt")
    assert (tmp_path / "ours.pt").stat().st_size == (tmp_path / "theirs.pt").stat().st_size
    state["half"] += 1
    write(tmp_path / "other.pt", state)
    identities = [zipfile.ZipFile(tmp_path / name).read(f"archive/{IDENTITY}") for name in ("ours.pt", "other.pt")]
    assert identities[0] != identities[1]


def test_storages_that_are_not_what_torch_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the archive is torch's own."""
    monkeypatch.setattr("normswap.checkpoints.torchfile.storages_of", lambda value: storages_of(value)[:-1])
    write(tmp_path / "a.pt", odd_tensors())
    monkeypatch.undo()
    write(tmp_path / "b.pt", odd_tensors())
    assert archive_of(tmp_path / "a.pt") == archive_of(tmp_path / "b.pt")


def test_a_flipped_bit_is_not_signed_as_right(tmp_path: Path) -> None:
    source = made(tmp_path, ".pt", {**odd_tensors(), "big": torch.ones(100)})
    (entry,) = [entry for entry in entries_of(source) if entry.size == 400]
    data = bytearray(source.read_bytes())
    data[entry.start + 7] ^= 1
    source.write_bytes(data)
    assert zipfile.ZipFile(source).testzip() == entry.name
    convert(source, tmp_path / "out.pt")
    assert zipfile.ZipFile(tmp_path / "out.pt").testzip() is not None


class TestWhereBytesLie:
    def test_in_a_mapped_archive(self, tmp_path: Path) -> None:
        source = made(tmp_path, ".ckpt", odd_tensors())
        found = read(source)
        origin = Origin.of(found)
        assert len(origin.regions) == 1
        data = source.read_bytes()
        for name in ("half", "whole", "row", "scalar"):
            span = origin.of_tensor(found.tensors, name)
            assert span is not None
            values = bytes(found.tensors[name].reshape(-1).view(torch.uint8).numpy())
            assert data[span.start : span.start + span.size] == values
        for name in ("turned", "column", "last", "none", "conjugate"):
            assert origin.of_tensor(found.tensors, name) is None
        assert origin.of_tensor({"x": torch.ones(3)}, "x") is None

    def test_not_where_it_is_not_certain(self, tmp_path: Path) -> None:
        torch.save([torch.ones(3), torch.ones(3)], tmp_path / "a.pt")
        loaded = torch.load(tmp_path / "a.pt", mmap=True)
        assert mapped_at(tmp_path / "a.pt", loaded) is not None
        assert mapped_at(tmp_path / "a.pt", loaded[:1]) is None  # It may be either entry.
        assert mapped_at(tmp_path / "a.pt", torch.load(tmp_path / "a.pt")) is None
        assert mapped_at(tmp_path / "a.pt", [lambda: 0]) is None

    def test_not_where_the_bytes_were_turned(self, tmp_path: Path) -> None:
        torch.save([torch.ones(3)], tmp_path / "a.pt")
        (order,) = [entry for entry in entries_of(tmp_path / "a.pt") if entry.name.endswith("byteorder")]
        data = bytearray((tmp_path / "a.pt").read_bytes())
        loaded = torch.load(tmp_path / "a.pt", mmap=True)
        data[order.start : order.start + order.size] = b"biggly"[: order.size]
        (tmp_path / "a.pt").write_bytes(data)
        assert mapped_at(tmp_path / "a.pt", loaded) is None

    def test_storages_are_numbered_as_torch_does(self, tmp_path: Path) -> None:
        value = {
            "a": torch.ones(2),
            "b": [torch.ones(3), torch.eye(2).to_sparse()],
            "c": torch.nn.Parameter(torch.ones(5)),
        }
        torch.save(value, tmp_path / "a.pt")
        sizes = {number(entry): entry.size for entry in entries_of(tmp_path / "a.pt") if number(entry) is not None}
        assert [storage.nbytes() for storage in storages_of(value)] == [sizes[index] for index in range(len(sizes))]


@pytest.mark.parametrize("to", ["group", "layer", "switchable"])
@pytest.mark.parametrize("init", ["copy", "reset"])
def test_a_mapped_file_gives_what_a_lazy_one_gives(tmp_path: Path, to: str, init: str) -> None:
    state = odd_tensors()
    found = []
    for ending in (".pt", ".safetensors"):
        convert(made(tmp_path, ending, state), tmp_path / f"out{ending}", to, init=init)
        found.append(read(tmp_path / f"out{ending}").tensors)
    assert sorted(found[0]) == sorted(found[1])
    assert len(found[0]) > 15
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class TestTransfer:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[list[Path], bytes]:
        data = bytes(range(256)) * 40
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(data)
        (tmp_path / "out").touch()
        return [tmp_path / "a", tmp_path / "b"], data

    def pieces(self, files: list[Path]) -> list[Piece]:
        return [
            Piece(0, 700, 300, Span(files[1], 100, 300), summed=True),
            Piece(0, 0, 500, Span(files[0], 1000, 500)),
            Piece(0, 500, 200, Span(files[0], 1500, 200)),
            Piece(0, 1000, 3, lambda: b"end", summed=True),
            Piece(0, 1003, 0, lambda: b""),
        ]

    @pytest.mark.parametrize("refuse", [False, True])
    def test_pieces_and_digest(self, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: bool) -> None:
        def none(*arguments: Any) -> int:
            raise OSError(errno.EXDEV, "other file system")

        if refuse:
            monkeypatch.setattr(os, "copy_file_range", none, raising=False)
        monkeypatch.setattr(transferring, "BLOCK", 64)
        monkeypatch.setattr(transferring, "STEP", 128)
        monkeypatch.setattr(transferring, "APART", 200)
        monkeypatch.setattr(transferring, "EARLY", 256)
        paths, data = files
        seen: list[tuple[int, int]] = []
        complete: list[int] = []
        pieces = self.pieces(paths)
        digest = transfer(
            [tmp_path / "out"], pieces, paths, progress=lambda *now: seen.append(now), complete=complete.append
        )
        assert digest == hashlib.sha256(data + data).hexdigest()
        assert (tmp_path / "out").read_bytes() == data[1000:1700] + data[100:400] + b"end"
        assert pieces[0].crc == zlib.crc32(data[100:400])
        assert pieces[3].crc == zlib.crc32(b"end")
        assert seen[-1] == (2 * len(data) + 3, 2 * len(data) + 3)
        assert seen == sorted(seen)
        assert complete == [0]

    def test_a_file_that_changes(self, files: Any, tmp_path: Path) -> None:
        paths, _ = files
        with pytest.raises(NormswapError, match="was changed while it was read"):
            transfer([tmp_path / "out"], self.pieces(paths), paths, progress=lambda *_: os.utime(paths[0], (1, 1)))
        paths[1].write_bytes(b"short")
        with pytest.raises(NormswapError, match="b was changed while it was read: it is shorter"):
            transfer([tmp_path / "out"], self.pieces(paths), paths)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full")])
    def test_errors_come_out_of_every_thread(self, files: Any, tmp_path: Path, error: BaseException) -> None:
        def fail(*_: Any) -> Any:
            raise error

        paths, _ = files
        for options in ({"progress": fail}, {"complete": fail}):
            with pytest.raises(type(error)):
                transfer([tmp_path / "out"], self.pieces(paths), paths, **options)
        with pytest.raises(type(error)):
            transfer([tmp_path / "out"], [Piece(0, 0, 3, fail)], paths)
        with pytest.raises(FileNotFoundError):
            transfer([tmp_path / "absent"], self.pieces(paths), paths)
        with pytest.raises(NormswapError, match="absent cannot be read"):
            transfer([tmp_path / "out"], [], [tmp_path / "absent"])


class Full:
    """Makes the ``number``-th call that writes to the disk fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        copier: Any = transferring._Copier
        for owner, name in (
            (os, "copy_file_range"), (os, "fsync"), (copier, "write"), (Path, "write_text"), (Path, "replace"),
            (Path, "rename"), (Path, "mkdir"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return call


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux")
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out/"])
def test_a_disk_that_is_full_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    source = made(tmp_path, ".ckpt", odd_tensors())
    options = {"max_shard_size": 600} if output == "out/" else {}
    failures = 0
    while True:
        with monkeypatch.context() as patch:
            full = Full(patch, failures + 1)
            message = ""
            try:
                convert(source, tmp_path / output, **options)
            except NormswapError as error:
                message = str(error)
        failures += 1
        if message:
            assert "No space left on device" in message
            assert str(tmp_path / output.rstrip("/")) in message
            assert [entry.name for entry in tmp_path.iterdir()] == [source.name], failures
            continue
        assert len(read(tmp_path / output).tensors) == 18
        if full.left > 0:
            break
        # The flush of a name failed, and the file is there.
        for entry in tmp_path.glob("out*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert failures > 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where the system lets one be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        done = None
    if done is None or done.returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out/"])
def test_a_disk_that_is_really_full(tmp_path: Path, small_disk: Path, output: str) -> None:
    state = {**odd_tensors(), **{f"w{index}": torch.randn(100_000) for index in range(5)}}
    options = {"max_shard_size": 500_000} if output == "out/" else {}
    with pytest.raises(NormswapError, match=r"No space left on device; it takes 2\.0 MB, and .* has 1\.0 MB"):
        convert(made(tmp_path, ".pt", state), small_disk / output, **options)
    assert list(small_disk.iterdir()) == []


PEAK = """
import sys
from pathlib import Path
import normswap
sys.path.insert(0, sys.argv[1])
from tests.test_checkpoint_transfer import convert
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
before = peak()
for name in sys.argv[2:]:
    convert(Path(name), Path(name + ".out.pt"))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_depend_on_the_size_of_the_file(tmp_path: Path) -> None:
    state = {name: value for name, value in odd_tensors().items() if name.startswith("norm")}
    state |= {f"w{index}": torch.ones(2**21) for index in range(8)}  # 64 MiB
    files = [tmp_path / "a.safetensors", tmp_path / "a.pt"]
    save_file(state, files[0])
    torch.save(state, files[1])
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent.parent), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024, done.stdout


class Keeping(torch.nn.Module):
    """Takes a buffer as the file has it, without a copy, as some models' own loading does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.kept = torch.nn.Buffer(torch.zeros(4))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.kept = state[prefix + "kept"]


def test_what_a_model_did_to_the_values_of_a_file_is_written(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", Keeping())
    source = load_source(Keeping(), tmp_path / "a.pt")
    source.model.get_buffer("kept").add_(1)
    plan = plan_convert(source.model, "group")
    save_source(source, plan.apply(inplace=True), plan.recipe, tmp_path / "b.pt")
    assert torch.equal(read(tmp_path / "b.pt").tensors["kept"], torch.ones(4))
