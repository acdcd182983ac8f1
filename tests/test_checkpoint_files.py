"""Files as they lie on disk: shards, folders, memory, and files that were damaged or made to deceive."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from normswap.checkpoint import load, read, write
from normswap.checkpoints.lazy import LazyTensors
from normswap.checkpoints.safety import check_statistics
from normswap.checkpoints.writing import parse_size, write_folder
from tests.support import randomise
from tests.test_checkpoint import Net, refused, same


def sharded(folder: Path, state: dict[str, Tensor], family: str) -> Path:
    """Two shards and their index, as ``save_pretrained`` names them."""
    folder.mkdir(exist_ok=True)
    stem, _, ending = family.partition(".")
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"{stem}-{number:05}-of-00002.{ending}"
        weight_map.update(dict.fromkeys(part, file))
        held = {name: state[name] for name in part}
        if ending == "safetensors":
            save_file(held, folder / file, metadata={"format": "pt"})
        else:
            torch.save(held, folder / file)
    index = folder / f"{family}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, "author": "someone"}, "weight_map": weight_map}))
    return index


@pytest.fixture
def net() -> Net:
    return randomise(Net())  # type: ignore[return-value]


def entry(dtype: str, size: int, begin: int, end: int) -> dict[str, Any]:
    """What the header of a safetensors file says of a tensor."""
    return {"dtype": dtype, "shape": [size], "data_offsets": [begin, end]}


FAMILIES = ["model.safetensors", "pytorch_model.bin"]


class TestPlaces:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("by_folder", [True, False])
    def test_shards(self, net: Net, tmp_path: Path, family: str, by_folder: bool) -> None:
        index = sharded(tmp_path / "m", net.state_dict(), family)
        found = read(tmp_path / "m" if by_folder else index)
        assert found.path == index
        assert found.files[0] == index
        assert len(found.files) == 3
        assert found.metadata == {"author": "someone"}
        fresh: Any = randomise(Net(), seed=9)
        assert load(fresh, found) == []
        assert same(net, fresh)

    @pytest.mark.parametrize("name", [*FAMILIES, "best.ckpt", "weights.pth"])
    def test_a_single_file_in_a_folder(self, net: Net, tmp_path: Path, name: str) -> None:
        (tmp_path / "config.json").write_text("{}")
        write(tmp_path / name, net)
        assert read(tmp_path).path == tmp_path / name

    def test_a_folder_with_several(self, net: Net, tmp_path: Path) -> None:
        for name in ("a.pt", "b.pt"):
            write(tmp_path / name, net)
        with refused("several checkpoints", "a.pt, b.pt"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("../x.safetensors", "no weights file in its folder"),
            ("/etc/passwd", "no weights file in its folder"),
            ("a/b.safetensors", "no weights file in its folder"),
            ("..\\x.safetensors", "no weights file in its folder"),
            ("..", "no weights file in its folder"),
            ("absent.safetensors", "not there"),
            ("model.safetensors.index.json", "no weights file in its folder"),
            (7, "weight_map"),
        ],
    )
    def test_hostile_indexes(self, net: Net, tmp_path: Path, name: Any, words: str) -> None:
        index = sharded(tmp_path / "m", net.state_dict(), FAMILIES[0])
        write(tmp_path / "x.safetensors", net)
        content = json.loads(index.read_text())
        content["weight_map"]["bn.weight"] = name
        index.write_text(json.dumps(content))
        with refused(words):
            read(index)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"weight_map": {}}', "{" * 5000, '{"weight_map": {"a": "b", "a": "c"}}']
    )
    def test_indexes_that_are_none(self, tmp_path: Path, text: str) -> None:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        with refused(index.name):
            read(index)

    @pytest.mark.parametrize("change", ["missing", "extra"])
    def test_an_index_that_does_not_fit_its_shards(self, net: Net, tmp_path: Path, change: str) -> None:
        index = sharded(tmp_path / "m", net.state_dict(), FAMILIES[0])
        content = json.loads(index.read_text())
        if change == "extra":
            del content["weight_map"]["bn.weight"]
        else:
            content["weight_map"]["other"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(content))
        with refused("does not fit its shards", "bn.weight" if change == "extra" else "other"):
            read(index)


class TestHostile:
    def rewritten(self, path: Path, target: Path, how: Any) -> Path:
        """The archive with every entry as ``how`` writes it."""
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as sink:
            for entry in source.infolist():
                how(sink, entry.filename, source.read(entry))
        return target

    def test_compressed_archives(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.pt", net)
        bomb = self.rewritten(
            tmp_path / "a.pt", tmp_path / "b.pt", lambda z, n, data: z.writestr(n, bytes(10**7), zipfile.ZIP_DEFLATED)
        )
        with refused("b.pt", "zip bomb"):
            read(bomb)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_entries_twice(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.pt", net)
        twice = self.rewritten(
            tmp_path / "a.pt", tmp_path / "b.pt", lambda z, n, data: (z.writestr(n, data), z.writestr(n, data))
        )
        with refused("b.pt", "twice"):
            read(twice)

    def test_a_storage_that_is_shorter_than_the_tensor(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.pt", net)
        short = self.rewritten(
            tmp_path / "a.pt", tmp_path / "b.pt", lambda z, n, data: z.writestr(n, data[:8] if "/data/" in n else data)
        )
        with refused("b.pt", "damaged"):
            read(short)

    def test_one_value_stretched_over_a_huge_shape(self, tmp_path: Path) -> None:
        torch.save({"weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
        with refused("a.pt", "(1000000, 1000000)"):
            read(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            ({"a": entry("F32", 2, 0, 8), "b": entry("F32", 2, 4, 12)}, "b overlaps"),
            ({"a": entry("F32", 2, 4, 12)}, "does not follow"),
            ({"a": entry("F32", 3, 0, 8)}, "damaged"),
            ({"a": entry("F32", -2, 0, 8)}, "no sense"),
            ({"a": entry("F32", 2, 0, 1 << 60)}, "truncated"),
            ({"a": entry("Q3", 2, 0, 8)}, "a.safetensors"),
            ({"a": 3}, "no sense"),
            ([1], "no JSON object"),
        ],
    )
    def test_headers(self, tmp_path: Path, header: Any, words: str) -> None:
        text = json.dumps(header).encode()
        data = bytes(12 if "overlaps" in words or "follow" in words else 8)
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        with refused("a.safetensors", words):
            read(tmp_path / "a.safetensors").tensors["a"]

    def test_names_twice_in_a_header(self, tmp_path: Path) -> None:
        entry = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
        text = f"{{{entry}, {entry}}}".encode()
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with refused("names a twice"):
            read(tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("running_var", -0.1, "negative running variance in layer.bn"),
            ("running_mean", float("nan"), "not finite in layer.bn (running_mean)"),
            ("running_var", float("inf"), "not finite in layer.bn (running_var)"),
        ],
    )
    def test_statistics(self, field: str, value: float, words: str) -> None:
        state = {"layer.bn.running_mean": torch.zeros(3), "layer.bn.running_var": torch.ones(3)}
        check_statistics(state, state, "a.pt")
        state[f"layer.bn.{field}"][1] = value
        with refused("a.pt", words):
            check_statistics(state, state, "a.pt")

    def test_trust_is_the_users(self, net: Net, tmp_path: Path) -> None:
        torch.save({"state_dict": net.state_dict(), "path": Path("x")}, tmp_path / "a.pt")
        with refused("--trust-pickle", "pathlib"):
            read(tmp_path / "a.pt")
        found = read(tmp_path / "a.pt", trust_pickle=True)
        assert found.left_out == ("path",)
        assert found.whole["path"] == Path("x")

    def test_a_namespace_of_arguments_is_no_danger(self, net: Net, tmp_path: Path) -> None:
        torch.save({"model": net.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
        assert read(tmp_path / "a.pt").whole["args"].lr == 0.1

    def test_code_hidden_in_a_namespace_is_not_run(self, net: Net, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"model": net.state_dict(), "args": argparse.Namespace(lr=Attack())}, tmp_path / "a.pt")
        (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Attack()}))
        for name in ("a.pt", "plain.pt"):
            with refused(name):
                read(tmp_path / name)
        assert not (tmp_path / "ran").exists()


class TestFolders:
    def test_shards_and_index(self, net: Net, tmp_path: Path) -> None:
        state = net.state_dict()
        names = write_folder(tmp_path / "out", state, metadata={"author": "me"}, max_shard_size=200)
        assert names[-1].name == "model.safetensors.index.json"
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in names)
        index = json.loads(names[-1].read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
        plain = {key: value for name in names[:-1] for key, value in load_file(name).items()}
        assert all(torch.equal(plain[name], state[name]) for name in state)
        assert len(plain) == len(state)
        assert read(tmp_path / "out").metadata == {"author": "me"}
        with refused("exists"):
            write_folder(tmp_path / "out", state)

    def test_one_file_where_it_fits_and_what_lies_beside(self, net: Net, tmp_path: Path) -> None:
        source = tmp_path / "in"
        sharded(source, net.state_dict(), FAMILIES[1])
        (source / "config.json").write_text("{}")
        write_folder(tmp_path / "out", read(source).tensors, beside=source)
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
        assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"]

    def test_nothing_is_left_of_a_folder_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("normswap.checkpoints.writing.write_tensors", full)
        with refused("No space left", "No partial folder"):
            write_folder(tmp_path / "out", {"a": torch.ones(2)})
        assert list(tmp_path.iterdir()) == []

    def test_sizes(self) -> None:
        sizes = [parse_size(t) for t in ("5GB", "200MB", "1GiB", "10", "1.5k")]
        assert sizes == [5 * 10**9, 2 * 10**8, 2**30, 10, 1500]
        for text in ("", "big", "-1GB", "0"):
            with refused("size"):
                parse_size(text)


def test_safetensors_is_read_when_asked_for(net: Net, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", net)
    found = read(tmp_path / "a.safetensors").tensors
    assert isinstance(found, LazyTensors)
    assert found["bn.weight"].data_ptr() != net.bn.weight.data_ptr()
    assert found.shapes["conv.weight"].shape == (4, 3, 3, 3)


PEAK = """
import resource, sys
from pathlib import Path
from normswap.checkpoint import read, write
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(Path(sys.argv[2]), read(sys.argv[1]).tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_is_bounded_by_what_is_open_not_by_the_file(tmp_path: Path) -> None:
    save_file({f"w{index}": torch.ones(2**21) for index in range(32)}, tmp_path / "a.safetensors")  # 256 MiB
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 1024, done.stdout
    assert (tmp_path / "a.safetensors").stat().st_size > 2**28
    assert (tmp_path / "b.safetensors").read_bytes()[-(2**23) :] == (tmp_path / "a.safetensors").read_bytes()[
        -(2**23) :
    ]


def test_malformed_files(tmp_path: Path) -> None:
    """A small part of ``scripts/fuzz_files.py``: 0 tracebacks, no code run, nothing left behind."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("fuzz_files", Path(__file__).parent.parent / "scripts/fuzz_files.py")
    assert spec is not None
    assert spec.loader is not None
    fuzz_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz_files)
    outcomes, broken = fuzz_files.fuzz(120, 7, tmp_path)
    assert broken == []
    assert outcomes["converted"] > 5
    assert outcomes["refused"] > 50
