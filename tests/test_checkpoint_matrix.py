"""Every format that is read, what is done to it, every format that is written: each result loads in the library that
the format belongs to, and holds what the same surgery on the model gives."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import normswap
from normswap.cli import app
from normswap.verification.runners import session
from tests.support import distance, randomise
from tests.zoo.schemas import declare

declare()

from torchvision.models.mobilenetv2 import InvertedResidual  # noqa: E402
from torchvision.ops import Conv2dNormActivation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NORMS = ["0.1", "1.conv.0.1", "1.conv.1.1", "1.conv.3"]
State = dict[str, Tensor]


def network() -> nn.Module:
    model = nn.Sequential(Conv2dNormActivation(3, 4, stride=2), InvertedResidual(4, 4, 1, 2))
    return randomise(model).eval()


MODEL = ("--model", f"{Path(__file__).resolve()}:network")


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


# --- what is read ----------------------------------------------------------------------------------------------------


def _nested(state: State, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)


def _sharded(save: Callable[[State, Path], object], name: str, state: State, path: Path) -> None:
    path.mkdir()
    stem, ending = name.split(".")
    places = {key: f"{stem}-0000{1 + index % 2}-of-00002.{ending}" for index, key in enumerate(state)}
    for file in set(places.values()):
        save({key: value for key, value in state.items() if places[key] == file}, path / file)
    (path / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def _distributed(state: State, path: Path) -> None:
    dcp.save({"model": state, "epoch": 3}, checkpoint_id=path)


def _pickled(state: State, path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}, 2))


def _whole(state: State, path: Path) -> None:
    path.mkdir()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


INPUTS: dict[str, Callable[[State, Path], object]] = {
    "a.pt": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "nested.ckpt": _nested,
    "a.safetensors": save_file,
    "folder": _whole,
    "shards": lambda state, path: _sharded(save_file, "model.safetensors", state, path),
    "old_shards": lambda state, path: _sharded(torch.save, "pytorch_model.bin", state, path),
    "distributed": _distributed,
    "a.pkl": _pickled,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    for name, save in INPUTS.items():
        save(network().state_dict(), folder / name)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, State]:
    """What surgery on the model itself gives, which computes what it should."""
    model = network()
    folded = normswap.fold(model)
    assert distance(folded(X), model(X)) < 1e-5
    return {"convert": normswap.convert(model, "group", groups=2).state_dict(), "fold": folded.state_dict()}


# --- what is written, read by the library that it belongs to ---------------------------------------------------------


def _read(path: Path, wanted: State) -> State:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.is_dir() and (path / ".metadata").exists():
        blank = {"model": {name: torch.zeros_like(value) for name, value in wanted.items()}}
        dcp.load(blank, checkpoint_id=path)
        return blank["model"]
    if path.is_dir():
        return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    found = torch.load(path, weights_only=True)
    for key in ("state_dict", "model"):
        found = found.get(key, found)
    return {name.removeprefix("module."): value for name, value in found.items()}


OPERATIONS = {
    "convert": ("convert", "--to", "group", "--groups", "2"),
    "convert with the model": ("convert", "--to", "group", "--groups", "2", *MODEL),
    "fold": ("fold", *MODEL),
}


@pytest.mark.parametrize("output", ["b.pt", "b.safetensors", "b/"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", INPUTS)
def test_state_dicts(
    inputs: Path, expected: dict[str, State], tmp_path: Path, name: str, operation: str, output: str
) -> None:
    first, *rest = OPERATIONS[operation]
    out = tmp_path / output
    command(first, inputs / name, *rest, "-o", f"{tmp_path}/{output}")
    wanted = expected[first]
    found = {key.removeprefix("module."): value for key, value in _read(out, wanted).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", INPUTS)
def test_inspect(inputs: Path, name: str) -> None:
    record = json.loads(command("inspect", inputs / name, *MODEL, "--json").stdout)
    assert [site["name"] for site in record["sites"]] == NORMS


# --- files with a graph ----------------------------------------------------------------------------------------------


def _onnxruntime(path: Path) -> Tensor:
    opened = session(path, optimized=False)
    return torch.from_numpy(opened.run(None, {opened.get_inputs()[0].name: X.numpy()})[0])


def _exported(path: Path) -> Tensor:
    found: Tensor = torch.export.load(path).module()(X)
    return found


GRAPHS: dict[str, Callable[[Path], Tensor]] = {".onnx": _onnxruntime, ".pt2": _exported}


@pytest.mark.parametrize("suffix", GRAPHS)
def test_graphs(tmp_path: Path, suffix: str) -> None:
    model, run = network(), GRAPHS[suffix]
    source, folded, converted = (tmp_path / f"{name}{suffix}" for name in "abc")
    normswap.export(model, source, (X,), **({"optimize": False} if suffix == ".onnx" else {}))
    record = json.loads(command("inspect", source, "--json").stdout)
    assert [site["kind"] for site in record["sites"]] == ["batch"] * len(NORMS)
    command("fold", source, "-o", folded, "--verify")
    assert distance(run(folded), model(X)) < 1e-5
    assert not json.loads(command("inspect", folded, "--json").stdout)["sites"]
    command("convert", source, "--to", "group", "--groups", "2", "-o", converted)
    assert distance(run(converted), normswap.convert(model, "group", groups=2)(X)) < 1e-5
    assert distance(run(converted), model(X)) > 1e-2


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_a_folder_of_transformers_loads_there(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2)
    model = randomise(transformers.ResNetForImageClassification(config)).eval()
    model.save_pretrained(tmp_path / "a")
    command("convert", tmp_path / "a", "--to", "sync", "-o", f"{tmp_path}/b/", "--max-shard-size", "2KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    found = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "b").eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(found(x).logits, model(x).logits)
