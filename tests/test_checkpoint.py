"""Checkpoints: what is read, what is refused and in which words, how keys are matched, how files are written."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.checkpoint import Checkpoint, load, read, write
from normswap.errors import NormswapError
from tests.support import picture, randomise


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bn(self.conv(x)).mean((2, 3)))
        return out


class Trainer:
    """A class no checkpoint may bring with it."""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


class Renaming(nn.Module):
    """A class whose own hook knows the names it had before."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(2, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}old.{name}" in state_dict:
                state_dict[f"{prefix}new.{name}"] = state_dict.pop(f"{prefix}old.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Versioned(nn.Linear):
    """Like torchvision's MNASNet, whose loading refuses a file of unknown version."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"unknown version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.fixture
def net() -> Net:
    return randomise(Net())  # type: ignore[return-value]


@pytest.fixture
def fresh() -> Net:
    return randomise(Net(), seed=9)  # type: ignore[return-value]


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """One clear message: the words are in it, and it is one line."""
    with pytest.raises(NormswapError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


class TestRead:
    @pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors"])
    def test_round_trip_keeps_names_values_and_dtypes(self, net: Net, tmp_path: Path, name: str) -> None:
        net.head.half()
        net.bn.to(torch.bfloat16)
        write(tmp_path / name, net)
        found = read(tmp_path / name)
        assert found.path == tmp_path / name
        assert found.format == ("safetensors" if name.endswith("s") else "torch")
        assert found.key is None
        assert found.left_out == ()
        assert sorted(found.tensors) == sorted(net.state_dict())
        for key, value in net.state_dict().items():
            assert found.tensors[key].dtype == value.dtype
            assert torch.equal(found.tensors[key], value)

    def test_legacy_file(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        found = read(tmp_path / "old.pth")
        assert found.format == "torch-legacy"
        assert load(fresh, found) == []
        assert same(net, fresh)

    def test_the_content_decides_not_the_name(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors", net)
        (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
        assert read(tmp_path / "a.pt").format == "safetensors"
        torch.save(net.state_dict(), tmp_path / "a.bin")
        assert read(tmp_path / "a.bin").format == "torch"

    @pytest.mark.parametrize(
        "key",
        ["state_dict", "model", "model_state_dict", "module", "net", "params", "weights", "model.state_dict", "own"],
    )
    def test_nested(self, net: Net, fresh: Net, tmp_path: Path, key: str) -> None:
        inner: Any = net.state_dict()
        for part in reversed(key.split(".")):
            inner = {part: inner}
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.randn(2, 3, 5, 5)).sum().backward()
        optimizer.step()
        torch.save({**inner, "epoch": 3, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        assert found.key == key
        assert found.left_out == ("epoch", "optimizer")
        assert sorted(found.tensors) == sorted(net.state_dict())
        assert any("epoch, optimizer" in note for note in load(fresh, found))

    def test_known_names_come_before_others_and_beside_lone_tensors(self, net: Net, tmp_path: Path) -> None:
        other = randomise(Net(), seed=5).state_dict()
        torch.save({"ema": other, "best": torch.tensor(0.5), "state_dict": net.state_dict()}, tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        assert found.key == "state_dict"
        assert torch.equal(found.tensors["conv.weight"], net.conv.weight)
        assert found.left_out == ("ema", "best")

    def test_several_of_unknown_name_are_not_guessed(self, net: Net, tmp_path: Path) -> None:
        other = randomise(Net(), seed=5).state_dict()
        torch.save({"generator": net.state_dict(), "critic": other}, tmp_path / "a.pt")
        with refused("a.pt", "generator, critic", "key="):
            read(tmp_path / "a.pt")
        assert torch.equal(read(tmp_path / "a.pt", key="critic").tensors["conv.bias"], other["conv.bias"])
        with refused("'missing'", "generator, critic"):
            read(tmp_path / "a.pt", key="missing")

    def test_extra_state_is_named(self, net: Net, tmp_path: Path) -> None:
        torch.save({**net.state_dict(), "bn._extra_state": {"scale": 2}}, tmp_path / "a.pt")
        assert read(tmp_path / "a.pt").left_out == ("bn._extra_state",)

    def test_metadata(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors", net, metadata={"author": "someone", "recipe": json.dumps([1, 2])})
        assert read(tmp_path / "a.safetensors").metadata == {"format": "pt", "author": "someone", "recipe": "[1, 2]"}

    @pytest.mark.parametrize("legacy", [False, True])
    def test_code_is_not_run_and_its_types_are_named(self, net: Net, tmp_path: Path, legacy: bool) -> None:
        torch.save(
            {"state_dict": net.state_dict(), "trainer": Trainer(), "path": Path("x")},
            tmp_path / "a.pt",
            _use_new_zipfile_serialization=not legacy,
        )
        with refused("a.pt", "tests.test_checkpoint.Trainer", "weights_only=False"):
            read(tmp_path / "a.pt")

    def test_every_blocked_type_is_named(self, net: Net, tmp_path: Path) -> None:
        torch.save({"model": net, "trainer": Trainer()}, tmp_path / "a.pt")
        with refused("tests.test_checkpoint.Trainer", "tests.test_checkpoint.Net"):
            read(tmp_path / "a.pt")

    def test_a_pickle_that_would_run_code_does_not(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"x": Attack()}, tmp_path / "a.pt")
        (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
        for name in ("a.pt", "b.pt"):
            with refused(name):
                read(tmp_path / name)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_torchscript(self, tmp_path: Path) -> None:
        torch.jit.script(nn.ReLU()).save(tmp_path / "a.pt")
        with refused("a.pt", "TorchScript"):
            read(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "empty"),
            (b"hello, this is no checkpoint", "no checkpoint"),
            (b"version https://git-lfs.example/spec/v1\noid sha256:1\n", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
            (b"GGUF" + bytes(64), "GGUF"),
            (bytes(600), "no checkpoint"),
            (b"\x80\x02garbage", "damaged"),
            (b"\x80\x02}q\x00.", "holds no state dict"),
            (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "nested too deeply"),
            (b"PK\x03\x04" + bytes(300), "damaged"),
        ],
    )
    def test_what_is_no_checkpoint(self, tmp_path: Path, content: bytes, words: str) -> None:
        (tmp_path / "a.pt").write_bytes(content)
        with refused("a.pt", words):
            read(tmp_path / "a.pt")

    def test_a_web_page_named_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_text("<html>404</html>")
        with refused("a.safetensors", "web page"):
            read(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "legacy.pt"])
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
    def test_truncated(self, net: Net, tmp_path: Path, name: str, share: float) -> None:
        path = tmp_path / name
        if name == "legacy.pt":
            torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
        else:
            write(path, net)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with refused(name):
            read(path)

    @pytest.mark.parametrize("value", [{}, {"epoch": 3}, [torch.ones(1)], torch.ones(1), {1: torch.ones(1)}])
    def test_without_a_state_dict(self, tmp_path: Path, value: object) -> None:
        torch.save(value, tmp_path / "a.pt")
        with refused("a.pt", "state dict"):
            read(tmp_path / "a.pt")

    def test_places_that_are_no_file(self, tmp_path: Path) -> None:
        with refused("absent.pt", "does not exist"):
            read(tmp_path / "absent.pt")
        with refused(str(tmp_path), "folder"):
            read(tmp_path)


class TestLoad:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.", "a"])
    def test_prefixes_are_dropped_where_needed(self, net: Net, fresh: Net, tmp_path: Path, prefix: str) -> None:
        torch.save(wrapped(net.state_dict(), prefix), tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        if prefix == "a":
            with refused("8 missing: conv.weight", "9 unexpected: aconv.weight"):
                load(fresh, found)
            return
        (note,) = load(fresh, found)
        plain = prefix.replace("_orig_mod.", "")
        assert (repr(plain) if plain else "marks of wrappers") in note
        assert same(net, fresh)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
    def test_prefixes_are_added_where_needed(self, net: Net, fresh: Net, tmp_path: Path, prefix: str) -> None:
        outer = nn.Module()
        outer.add_module(prefix.rstrip("."), fresh)
        write(tmp_path / "a.pt", net)
        (note,) = load(outer, read(tmp_path / "a.pt"))
        assert prefix in note or "marks" in note
        assert same(net, fresh)

    def test_a_submodule_named_model_keeps_its_name(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        ours, theirs = nn.Module(), nn.Module()
        ours.model, theirs.model = net, fresh
        write(tmp_path / "a.pt", ours)
        assert load(theirs, read(tmp_path / "a.pt")) == []
        assert same(net, fresh)

    def test_one_prefix_for_another(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        torch.save(wrapped(net.state_dict(), "module."), tmp_path / "a.pt")
        outer = nn.Module()
        outer.model = fresh
        (note,) = load(outer, read(tmp_path / "a.pt"))
        assert "dropped the prefix 'module.' and added the prefix 'model.'" in note
        assert same(net, fresh)

    def test_a_compiled_submodule(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        state = {name.replace("bn.", "bn._orig_mod."): value for name, value in net.state_dict().items()}
        torch.save(state, tmp_path / "a.pt")
        load(fresh, read(tmp_path / "a.pt"))
        assert same(net, fresh)

    def test_keys_beside_a_prefix_are_unexpected(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        state = {**wrapped(net.state_dict(), "model."), "loss.weight": torch.ones(3)}
        torch.save(state, tmp_path / "a.pt")
        before = picture(fresh)
        with refused("1 unexpected: loss.weight"):
            load(fresh, read(tmp_path / "a.pt"))
        assert before.differences(fresh) == []
        notes = load(fresh, read(tmp_path / "a.pt"), partial=True)
        assert any("1 unexpected: loss.weight" in note for note in notes)
        assert same(net, fresh)

    def test_misfits_are_counted_and_named_and_nothing_is_loaded(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        state = net.state_dict()
        del state["conv.bias"], state["bn.weight"]
        state["head.weight"] = torch.ones(7, 4)
        state["old.gamma"] = torch.ones(1)
        torch.save(state, tmp_path / "a.pt")
        before = picture(fresh)
        with refused(
            "a.pt",
            "does not fit Net",
            "2 missing: conv.bias, bn.weight",
            "1 unexpected: old.gamma",
            "1 of another shape: head.weight ((7, 4), model (2, 4))",
            "--partial",
        ):
            load(fresh, read(tmp_path / "a.pt"))
        assert before.differences(fresh) == []

        kept = {name: value.clone() for name, value in fresh.state_dict().items()}
        notes = load(fresh, read(tmp_path / "a.pt"), partial=True)
        assert len([note for note in notes if note.startswith("partly loaded")]) == 3
        after = fresh.state_dict()
        for name, value in kept.items():
            expected = value if name in ("conv.bias", "bn.weight", "head.weight") else state[name]
            assert torch.equal(after[name], expected), name

    def test_many_names_are_cut(self, tmp_path: Path) -> None:
        torch.save({f"layer{index}.weight": torch.ones(1) for index in range(30)}, tmp_path / "a.pt")
        with refused("30 unexpected: layer0.weight", "(30 in all)"):
            load(Net(), read(tmp_path / "a.pt"))

    def test_partial_needs_one_tensor_that_fits(self, net: Net, tmp_path: Path) -> None:
        torch.save({"other.weight": torch.ones(1)}, tmp_path / "a.pt")
        with refused("no tensor that fits"):
            load(net, read(tmp_path / "a.pt"), partial=True)

    def test_files_without_batch_counters(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        state = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
        fresh.bn.num_batches_tracked.fill_(7)
        torch.save(state, tmp_path / "a.pt")
        (note,) = load(fresh, read(tmp_path / "a.pt"))
        assert "1 num_batches_tracked" in note
        assert torch.equal(fresh.bn.running_var, net.bn.running_var)
        assert int(fresh.bn.num_batches_tracked) == 7

    def test_casts_are_noted(self, net: Net, fresh: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors", net.half())
        (note,) = load(fresh, read(tmp_path / "a.safetensors"))
        assert note == "8 tensors cast from torch.float16 in the file to the model's torch.float32"
        assert torch.equal(fresh.conv.weight, net.conv.weight.float())

    def test_tied_parameter_that_the_file_holds_once(self, tmp_path: Path) -> None:
        source, target = randomise(Tied()), randomise(Tied(), seed=4)
        torch.save({"embed.weight": source.state_dict()["embed.weight"]}, tmp_path / "a.pt")
        (note,) = load(target, read(tmp_path / "a.pt"))
        assert "out.weight" in note
        assert "tied" in note
        assert same(source, target)

    def test_the_models_hooks_know_older_names(self, tmp_path: Path) -> None:
        source, target = randomise(Renaming()), randomise(Renaming(), seed=4)
        torch.save(
            {name.replace("new", "old"): value for name, value in source.state_dict().items()}, tmp_path / "a.pt"
        )
        (note,) = load(target, read(tmp_path / "a.pt"))
        assert "hooks" in note
        assert same(source, target)

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_versions_reach_the_models_hooks(self, tmp_path: Path, name: str) -> None:
        source, target = randomise(Versioned(2, 2)), randomise(Versioned(2, 2), seed=4)
        write(tmp_path / name, source)
        assert load(target, read(tmp_path / name)) == []
        assert same(source, target)

    def test_versions_move_with_the_prefix(self, tmp_path: Path) -> None:
        outer = nn.Module()
        outer.module = randomise(Versioned(2, 2))
        outer.module._version = 5
        write(tmp_path / "a.pt", outer)
        seen = []

        class Watching(nn.Linear):
            def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
                seen.append(metadata.get("version"))
                super()._load_from_state_dict(state, prefix, metadata, *args)

        load(Watching(2, 2), read(tmp_path / "a.pt"))
        assert seen == [5]

    def test_lazy_modules_take_their_shape(self, tmp_path: Path) -> None:
        source, target = randomise(nn.Sequential(nn.Linear(3, 4))), nn.Sequential(nn.LazyLinear(4))
        write(tmp_path / "a.pt", source)
        load(target, read(tmp_path / "a.pt"))
        assert torch.equal(target[0].weight, source[0].weight)

    def test_meta_model(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.pt", net)
        with torch.device("meta"):
            target = Net()
        with refused("to_empty"):
            load(target, read(tmp_path / "a.pt"))

    def test_layout_of_the_model_stays(self, net: Net, tmp_path: Path) -> None:
        source = Net().to(memory_format=torch.channels_last)
        write(tmp_path / "a.safetensors", source)
        target = net.to(memory_format=torch.channels_last)
        load(target, read(tmp_path / "a.safetensors"))
        assert target.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert same(source, target)


class TestWrite:
    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_shared_overlapping_and_strided_tensors(self, tmp_path: Path, name: str) -> None:
        whole = torch.randn(6, 4)
        state = {
            "whole": whole,
            "again": whole,
            "head": whole[:4],
            "tail": whole[2:],
            "column": whole[:, 1],
            "turned": whole.t(),
            "last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
            "none": torch.empty(0, 3),
            "one": torch.tensor(3),
        }
        expected = {key: value.clone() for key, value in state.items()}
        write(tmp_path / name, state)
        found = read(tmp_path / name).tensors
        assert sorted(found) == sorted(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key

    def test_tied_model(self, tmp_path: Path) -> None:
        source = randomise(Tied())
        write(tmp_path / "a.safetensors", source)
        assert sorted(read(tmp_path / "a.safetensors").tensors) == ["embed.weight", "out.weight"]
        target = randomise(Tied(), seed=3)
        assert load(target, read(tmp_path / "a.safetensors")) == []
        assert target.out.weight is target.embed.weight
        assert same(source, target)

    def test_pt_is_what_torch_would_write(self, net: Net, tmp_path: Path) -> None:
        write(tmp_path / "a.pt", net)
        plain = torch.load(tmp_path / "a.pt", weights_only=True)
        assert isinstance(plain, OrderedDict)
        Net().load_state_dict(plain, strict=True)

    def test_existing_files(self, net: Net, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        path.write_text("old")
        with refused("a.pt", "exists", "--force"):
            write(path, net)
        assert path.read_text() == "old"
        write(path, net, force=True)
        assert same_file(path, net)

    def test_never_over_an_input(self, net: Net, tmp_path: Path) -> None:
        source, link, hard = tmp_path / "a.pt", tmp_path / "link.pt", tmp_path / "hard.pt"
        write(source, net)
        link.symlink_to(source)
        hard.hardlink_to(source)
        before = source.read_bytes()
        for target in (source, link, hard, tmp_path / "x" / ".." / "a.pt"):
            (tmp_path / "x").mkdir(exist_ok=True)
            with refused("input"):
                write(target, net, force=True, inputs=(source,))
        assert source.read_bytes() == before

    def test_places_that_cannot_be_written(self, net: Net, tmp_path: Path) -> None:
        with refused("a.onnx", ".safetensors"):
            write(tmp_path / "a.onnx", net)
        with refused("no_folder", "does not exist"):
            write(tmp_path / "no_folder" / "a.pt", net)
        (tmp_path / "b.pt").mkdir()
        with refused("b.pt", "folder"):
            write(tmp_path / "b.pt", net, force=True)

    def test_what_a_format_cannot_hold(self, net: Net, tmp_path: Path) -> None:
        with refused("a.pt", "metadata"):
            write(tmp_path / "a.pt", net, metadata={"a": "b"})
        with refused("metadata", "epoch"):
            write(tmp_path / "a.safetensors", net, metadata={"epoch": 3})  # type: ignore[dict-item]
        with refused("_extra_state"):
            write(tmp_path / "a.safetensors", {**net.state_dict(), "_extra_state": 3})  # type: ignore[dict-item]
        with refused("sparse"):
            write(tmp_path / "a.safetensors", {"x": torch.eye(2).to_sparse()})
        for name in ("a.pt", "a.safetensors"):
            with refused("w", "meta"):
                write(tmp_path / name, {"w": torch.empty(2, device="meta")})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    @pytest.mark.parametrize("old", [None, "old"])
    def test_full_disk_leaves_what_was_there(self, tmp_path: Path, name: str, old: str | None) -> None:
        import resource

        if old is not None:
            (tmp_path / name).write_text(old)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with refused(name, "File too large"):
                write(tmp_path / name, {"x": torch.randn(100_000)}, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({} if old is None else {name: old})

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_interrupt_leaves_what_was_there(
        self, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        written = []

        def interrupted(first: Any, second: Any, *rest: Any, **options: Any) -> None:
            if isinstance(first, list):
                first[0].write_bytes(b"half")
            else:
                second.write(b"half")
            written.extend(tmp_path.iterdir())
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", interrupted)
        monkeypatch.setattr("normswap.checkpoints.writing.write_tensors", interrupted)
        (tmp_path / name).write_text("old")
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name, net, force=True)
        assert len(written) == 2
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "old"}

    @pytest.mark.skipif(os.name != "posix", reason="file modes")
    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_file_modes(self, net: Net, tmp_path: Path, name: str) -> None:
        (tmp_path / "plain").write_text("")
        write(tmp_path / name, net)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / name).chmod(0o600)
        write(tmp_path / name, net, force=True)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600

    def test_a_link_is_followed_and_kept(self, net: Net, tmp_path: Path) -> None:
        (tmp_path / "real.pt").write_text("old")
        (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
        write(tmp_path / "link.pt", net, force=True)
        assert (tmp_path / "link.pt").is_symlink()
        assert same_file(tmp_path / "real.pt", net)


def same_file(path: Path, model: nn.Module) -> bool:
    found = read(path).tensors
    return all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_repr_does_not_print_tensors(net: Net, tmp_path: Path) -> None:
    write(tmp_path / "a.pt", net)
    assert len(repr(read(tmp_path / "a.pt"))) < 300
    assert isinstance(read(tmp_path / "a.pt"), Checkpoint)
