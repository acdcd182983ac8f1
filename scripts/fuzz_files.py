"""Malformed checkpoints by the thousand: each is converted, or refused in one clear message.

    python scripts/fuzz_files.py --count 3000 --seed 0

Files are made from good ones by bit flips, truncations, swapped headers and spliced parts, and made to deceive: pickles
that would run code, indexes that point elsewhere, archives that unpack to more than they are. Held against each: no
error but NormswapError, no code run, no output that is there in part, the input as it was, and bounds on time and
memory. A file is the same for the same seed and number. Exit status 1 when one of these does not hold.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pickle
import random
import resource
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from normswap import NormswapError
from normswap.checkpoint import read
from normswap.source import load_keys, save_source

MEMORY = 1 << 30
"""Bytes that the whole run may take beyond what it begins with."""
SECONDS = 10.0


class Attack:
    """A pickle that makes a folder when it is loaded with its code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def seeds(folder: Path) -> list[Path]:
    """Good files of every format, small."""
    from normswap.checkpoints.writing import write, write_folder

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)).state_dict()
    write(folder / "plain.pt", state, force=True)
    write(folder / "plain.safetensors", state, force=True)
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, folder / "nested.ckpt")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    if not (folder / "shards").exists():
        write_folder(folder / "shards", state, max_shard_size=200)
    return [folder / name for name in ("plain.pt", "plain.safetensors", "nested.ckpt", "legacy.pth")]


def flipped(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    # Most faults go to the front and the end, where headers and the directory of an archive are.
    for _ in range(rng.choice((1, 2, 8, 64))):
        place = rng.choice((rng.randrange(min(600, len(found))), rng.randrange(len(found)), -rng.randrange(1, 400)))
        found[place] = rng.randrange(256) if rng.random() < 0.5 else found[place] ^ (1 << rng.randrange(8))
    return bytes(found)


def truncated(rng: random.Random, data: bytes) -> bytes:
    cut = rng.randrange(len(data))
    return data[:cut] if rng.random() < 0.7 else data[cut:]


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    size = rng.choice((8, 64, 512, len(other) // 2))
    return rng.choice((other[:size] + data[size:], data[: len(data) // 2] + other[len(other) // 2 :], data + other))


def header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a header that lies."""
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    name = rng.choice([name for name in content if name != "__metadata__"])
    number = rng.choice((0, 1, -1, 3, 2**31, 2**63, 2**64, 1.5, "4", None, True, [1], 10**30))
    change = rng.randrange(5)
    if change == 0:
        content[name]["shape"] = [number]
    elif change == 1:
        content[name]["data_offsets"] = [rng.choice((0, number)), number]
    elif change == 2:
        content[name]["dtype"] = rng.choice(("F64", "BOOL", "Q9", "", 3, "F8_E8M0", "F4", "C64"))
    elif change == 3:
        content[rng.choice(("", "..", "a" * 5000, "running_var", "x.running_mean"))] = content.pop(name)
    else:
        content[name] = number
    text = json.dumps(content).encode()
    size = len(text) if rng.random() < 0.8 else rng.choice((0, 2**63, len(text) * 2, 10**8))
    return size.to_bytes(8, "little") + text + data[8 + length :]


def hostile(rng: random.Random, path: Path, mark: Path) -> None:
    """A pickle, alone or in an archive, that would run code; or one that goes deep, or wide."""
    attack: Any = Attack(mark)
    value = rng.choice(
        (attack, {"a": attack}, {"model": {"w": torch.ones(2)}, "x": [attack]}, argparse.Namespace(a=attack))
    )
    choice = rng.randrange(5)
    if choice == 0:
        path.write_bytes(pickle.dumps(value, protocol=rng.choice((0, 2, 4, 5))))
    elif choice == 1:
        torch.save(value, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    elif choice == 2:
        path.write_bytes(b"\x80\x02" + b"(" * rng.choice((100, 10**5)) + b"l" * 100 + b".")
    elif choice == 3:
        torch.save({"bn.running_var": torch.ones(1).expand(rng.choice((10**3, 10**12)))}, path)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED) as archive:
            archive.writestr("a/data.pkl", pickle.dumps(value, 2))
            archive.writestr("a/version", "3")
            archive.writestr("a/data/0", bytes(rng.choice((8, 10**7))))


def index(rng: random.Random, folder: Path, good: Path) -> Path:
    """A folder whose index lies."""
    folder.mkdir()
    for file in (good / "shards").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = next(folder.glob("*.index.json"))
    content = json.loads(path.read_text())
    name = rng.choice(list(content["weight_map"]))
    lies = (
        "../plain.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a/../b",
        path.name,
        "\0",
        "x" * 300,
        None,
        3,
        ["a"],
        "C:\\x",
    )
    change = rng.randrange(5)
    if change == 0:
        content["weight_map"][name] = rng.choice(lies)
    elif change == 1:
        content["weight_map"][rng.choice(("new", "", name + "x"))] = content["weight_map"].pop(name)
    elif change == 2:
        content["metadata"] = rng.choice((None, [], "x", {"total_size": "x", "normswap.recipe": "[" * 5000}))
    text = json.dumps(content).encode()
    path.write_bytes(text if change < 3 else flipped(rng, text) if change == 3 else truncated(rng, text))
    return folder


def made(number: int, seed: int, good: list[Path], folder: Path, mark: Path) -> Path:
    """The malformed file of that number."""
    rng = random.Random(f"{seed}:{number}")
    source = rng.choice(good)
    data = source.read_bytes()
    path = folder / f"f{number}{source.suffix}"
    kind = rng.choice(("flip", "flip", "cut", "splice", "header", "hostile", "index"))
    if kind == "hostile":
        hostile(rng, path, mark)
        return path
    if kind == "index":
        return index(rng, folder / f"f{number}", good[0].parent)
    changes: dict[str, Callable[[], bytes]] = {
        "flip": lambda: flipped(rng, data),
        "cut": lambda: truncated(rng, data),
        "splice": lambda: spliced(rng, data, rng.choice(good).read_bytes()),
        "header": lambda: header(rng, good[1].read_bytes()),
    }
    path.write_bytes(changes[kind]())
    return path


def digest(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def attempt(path: Path, output: Path, mark: Path) -> tuple[str, str | None]:
    """What became of a file, and what was wrong about it."""
    before, begun = digest(path), time.perf_counter()
    try:
        source = load_keys(path, "group")
        assert source.surgery is not None
        if not source.surgery.plan.changes:
            raise NormswapError("nothing to change")
        written = save_source(source, source.model, source.surgery.plan.recipe, output)
        outcome, wrong = "converted", None
        if not read(written[0]).tensors:
            wrong = "its output is empty"
    except NormswapError as error:
        outcome, wrong = "refused", None if "\n" not in str(error) and str(error) else f"message {str(error)!r}"
        left = [file for file in output.parent.iterdir() if file != path]
        if left:
            wrong = f"it left {left[0].name}"
    except Exception as error:
        outcome, wrong = "raised", f"{type(error).__name__}: {str(error)[:200]}"
    if mark.exists():
        wrong = "code was executed"
        mark.rmdir()
    if digest(path) != before:
        wrong = "the input was changed"
    if (taken := time.perf_counter() - begun) > SECONDS:
        wrong = f"it took {taken:.0f} s"
    for file in output.parent.iterdir():
        if file != path:
            file.unlink()
    return outcome, wrong


def fuzz(count: int, seed: int, folder: Path) -> tuple[collections.Counter[str], list[str]]:
    """How many files came to which end, and every one that broke a promise; the folder is used for all of them."""
    import shutil

    good = seeds(folder / "good")
    work = folder / "work"
    outcomes: collections.Counter[str] = collections.Counter()
    broken = []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        work.mkdir(exist_ok=True)
        mark = folder / "ran"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = made(number, seed, good, work, mark)
            outcome, wrong = attempt(path, work / "out.safetensors", mark)
        outcomes[outcome] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        if grown > MEMORY:
            wrong = f"memory grew by {grown >> 20} MiB"
            peak += grown // 1024
        if wrong:
            broken.append(f"{number}: {path.name}: {wrong}")
        shutil.rmtree(work)
    return outcomes, broken


def main() -> int:
    import tempfile

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, broken = fuzz(options.count, options.seed, Path(folder))
    for line in broken:
        print(line)
    ends = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
    print(f"{options.count} files in {time.perf_counter() - begun:.0f} s: {ends}; {len(broken)} broke a promise")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
