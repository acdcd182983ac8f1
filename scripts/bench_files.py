"""Converting checkpoint files: time beside that of ``cp``, and memory; a section of ``scripts/bench.py``.

Every figure is from a process of its own. Files are copied and converted in turns, on one disk: with the input in the
system's memory (warm), and after it was dropped from there (cold). A copy is timed as ``cp`` leaves it, and with the
flush to the disk (``cp``, then ``sync``) that a conversion always ends with.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

CONVERT = """
import json, sys, threading, time
from pathlib import Path
import torch
from normswap.source import load_keys, save_source

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

def watch():
    while not done.wait(0.02):
        peaks[0] = max(peaks[0], status("RssAnon"))

peaks, done = [status("RssAnon")], threading.Event()
empty = status("VmHWM")
watcher = threading.Thread(target=watch)
watcher.start()
begun = time.perf_counter()
source = load_keys(Path(sys.argv[1]), "group")
options = {"max_shard_size": int(sys.argv[3])} if sys.argv[3] != "0" else {}
save_source(source, source.model, source.surgery.plan.recipe, Path(sys.argv[2]), **options)
seconds = time.perf_counter() - begun
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "peak": status("VmHWM"), "anonymous": peaks[0], "empty": empty}))
"""


def layers(count: int, values: int) -> dict[str, Tensor]:
    """``count`` layers of ``values`` float32 each, with a norm behind each."""
    state = {}
    for layer in range(count):
        state[f"layers.{layer:04}.conv.weight"] = torch.randn(values // 64, 64)
        for name in ("weight", "bias", "running_mean"):
            state[f"layers.{layer:04}.norm.{name}"] = torch.randn(512)
        state[f"layers.{layer:04}.norm.running_var"] = torch.rand(512) + 0.5
        state[f"layers.{layer:04}.norm.num_batches_tracked"] = torch.tensor(7)
    return state


def make(folder: Path, gigabytes: float) -> dict[str, Path]:
    """The inputs: one file of each format of 768 MiB, and shards of ``gigabytes`` in all."""
    state = layers(48, 2**22)
    save_file(state, folder / "one.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / "one.pt")
    del state
    shards, number = folder / "shards", 0
    shards.mkdir()
    weight_map, total, content = {}, 0, layers(8, 2**22)
    while total < gigabytes * 1e9:
        number += 1
        part = {f"part{number:03}.{name}": value for name, value in content.items()}
        name = f"model-{number:05}.safetensors"
        save_file(part, shards / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
        total += sum(value.nbytes for value in part.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (shards / "model.safetensors.index.json").write_text(text)
    return {"one .safetensors": folder / "one.safetensors", "one .pt": folder / "one.pt", "shards": shards}


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def cool(path: Path) -> None:
    """Drop a file or the files of a folder from the system's memory."""
    for file in files(path):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    for file in files(path):
        with file.open("rb", buffering=0) as handle:
            while handle.read(16 * MIB):
                pass


def removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.with_name(path.name + ".normswap.json").unlink(missing_ok=True)


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp``, and with the flush of what it wrote."""
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    plain = time.perf_counter() - begun
    subprocess.run(["sync", *map(str, files(target))], check=True)
    return plain, time.perf_counter() - begun


def converted(source: Path, target: Path, shard: int) -> dict[str, float]:
    command = [sys.executable, "-c", CONVERT, str(source), str(target), str(shard)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def row(runs: list[tuple[float, float, dict[str, float]]]) -> str:
    plain, flushed = (statistics.median(times) for times in ([run[0] for run in runs], [run[1] for run in runs]))
    seconds = statistics.median(run["seconds"] for _, _, run in runs)
    to_plain = statistics.median(plain / run["seconds"] for plain, _, run in runs)
    to_flushed = statistics.median(flushed / run["seconds"] for _, flushed, run in runs)
    peak, anonymous = (max(run[key] for _, _, run in runs) / 1024 for key in ("peak", "anonymous"))
    times = f"| {plain:.2f} | {flushed:.2f} | {seconds:.2f} | {to_plain:.2f} | {to_flushed:.2f} "
    return f"{times}| {peak:.0f} | {anonymous:.0f} |"


def bench(repeats: int, gigabytes: float = 6.0) -> list[str]:
    lines = [
        "| input | output | cache | `cp`, s | `cp` and `sync`, s | converted, s | speed to `cp` | to `cp` and `sync` |"
        " peak memory, MiB | anonymous, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    empty: list[float] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("NORMSWAP_BENCH_DIR")) as name:
        folder = Path(name)
        inputs = make(folder, gigabytes)
        cases: list[tuple[str, str, int]] = [
            ("shards", "out", 10**9),
            ("one .safetensors", "out.safetensors", 0),
            ("one .safetensors", "out.pt", 0),
            ("one .pt", "out.pt", 0),
            ("one .pt", "out.safetensors", 0),
        ]
        states: dict[str, Callable[[Path], None]] = {"warm": warm, "cold": cool}
        for case, output, shard in cases:
            source, size = inputs[case], sum(file.stat().st_size for file in files(inputs[case]))
            for cache, prepare in states.items():
                runs: list[tuple[float, float, dict[str, float]]] = []
                for _ in range(repeats):
                    prepare(source)
                    plain, flushed = copied(source, folder / "copy")
                    removed(folder / "copy")
                    prepare(source)
                    runs.append((plain, flushed, converted(source, folder / output, shard)))
                    removed(folder / output)
                lines.append(f"| {case}, {size / 1e9:.2f} GB | {output} | {cache} {row(runs)}")
                empty += [run["empty"] for _, _, run in runs]
                print(lines[-1], flush=True)
    return [
        f"Median of {repeats}. Of the memory, {max(empty) / 1024:.0f} MiB are Python, torch and this package, before a"
        " file is opened.",
        "",
        *lines,
    ]
