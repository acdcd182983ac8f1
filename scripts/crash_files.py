"""Conversions that are killed: the input stays, the output is absent or complete, and the next run finds its way.

    python scripts/crash_files.py --count 200 --seed 0

Each conversion is a process that is sent SIGKILL, SIGTERM or SIGINT, at a random moment or at a random one of the
points where it does something to files. Held against each: the input as it was, the output absent (or what was there
before) or complete to the last byte, nothing else left but files named as temporary ones, and after SIGTERM and SIGINT
not even these. Then the same command is run again, to its end: its output must be right and nothing else be left.
Exit status 1 when one of these does not hold. POSIX only.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor

from normswap.cli import app
from normswap.console import INTERRUPTED
from normswap.files import TEMPORARY

INPUT, OUTPUT, SAID = "input", "output", "said"
KILLED = -signal.SIGKILL


def state_dict(layers: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(layers):
        state[f"{layer}.conv.weight"] = torch.randn(width, 8, 3, 3, generator=generator)
        for name in ("weight", "bias", "running_mean"):
            state[f"{layer}.norm.{name}"] = torch.randn(width, generator=generator)
        state[f"{layer}.norm.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{layer}.norm.num_batches_tracked"] = torch.tensor(7)
    return state


def inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """The commands by name: their words, and the name of what they write."""
    folder.mkdir()
    state = state_dict(24, 400)
    save_file(state, folder / "a.safetensors", metadata={"format": "pt"})
    torch.save({"model": state, "epoch": 3, "rest": [torch.ones(1000)]}, folder / "a.ckpt")
    shards = ["--max-shard-size", "400kB"]
    return {
        "one file": (["a.safetensors"], "out.safetensors"),
        "an archive": (["a.ckpt"], "out.ckpt"),
        "over a file": (["a.ckpt", "--force"], "old.pt"),
        "shards": (["a.safetensors", *shards], "shards/"),
        "resumed shards": (["a.ckpt", *shards, "--resume"], "resumed/"),
    }


def content(folder: Path) -> dict[str, str]:
    """Digests of all files, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def started(folder: Path, words: list[str], output: str, stop_at: int, count: Any = None) -> int:
    """A process that runs the command, and kills itself at the point ``stop_at`` or tells ``count`` how many it met."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        nothing, said = os.open(os.devnull, os.O_RDWR), os.open(folder / SAID, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream, handle in enumerate((nothing, nothing, said)):
            os.dup2(handle, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        met = 0

        def watch(event: str, values: tuple[Any, ...]) -> None:
            nonlocal met
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "fcntl.flock"):
                met += 1
                if met == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        source, *options = words
        command = ["convert", str(folder / INPUT / source), "--to", "group", "-o", str(folder / OUTPUT / output)]
        try:
            app([*command, *options])
        except SystemExit as end:
            status = int(end.code or 0)
        if count is not None:
            os.write(count, str(met).encode())
    except KeyboardInterrupt:  # Before the command, or after it.
        status = INTERRUPTED
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, or the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(folder: Path) -> None:
    shutil.rmtree(folder / OUTPUT, ignore_errors=True)
    (folder / OUTPUT).mkdir()
    (folder / OUTPUT / "old.pt").write_text("old")


def attempt(
    rng: random.Random, folder: Path, words: list[str], output: str, right: dict[str, str], seconds: float, points: int
) -> tuple[str, list[str]]:
    """What became of one conversion, and what was wrong."""
    fresh(folder)
    before, wrong = content(folder / INPUT), []
    begun = content(folder / OUTPUT)
    number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    by_time = number != signal.SIGKILL or rng.random() < 0.5
    child = started(folder, words, output, 0 if by_time else rng.randrange(1, points + 1))
    if by_time:
        time.sleep(rng.random() * seconds * 1.1)
        os.kill(child, number)
    status = ended(child)
    left = content(folder / OUTPUT)
    visible = {name: digest for name, digest in left.items() if TEMPORARY not in name}
    hidden = {name.split("/")[0] for name in left if TEMPORARY in name}
    # A recipe may be there just before its checkpoint; never the other way round.
    orphan = {name: digest for name, digest in right.items() if name.endswith(".normswap.json")}
    if visible == right and begun != right:
        outcome = "complete"
    elif visible in (begun, begun | orphan):
        outcome = "absent"
    else:
        outcome, wrong = "in part", [f"output in part: {sorted(visible)}"]
    if content(folder / INPUT) != before:
        wrong.append("the input was changed")
    if not all(name.startswith(".") and name.endswith(TEMPORARY) for name in hidden):
        wrong.append(f"left behind: {sorted(hidden)}")
    if hidden and status != KILLED and "--resume" not in words and status != -number:
        wrong.append(f"left behind after signal {number.name} (status {status}): {sorted(hidden)}")
    if status not in (0, INTERRUPTED, KILLED, -number):
        wrong.append(f"exit status {status} after {number.name}: {(folder / SAID).read_text()[-300:]}")
    if outcome == "absent":
        status = ended(started(folder, words, output, 0))
        if status or content(folder / OUTPUT) != right:
            found = content(folder / OUTPUT)
            odd = sorted(name for name in right.keys() | found.keys() if right.get(name) != found.get(name))
            wrong.append(f"the next run ends with {status} and other files: {odd}")
    return f"{number.name}, {outcome}", wrong


def crash(count: int, seed: int, folder: Path) -> tuple[collections.Counter[str], list[str]]:
    """How many conversions came to which end, and every broken promise."""
    commands = inputs(folder / INPUT)
    expected: dict[str, tuple[dict[str, str], float, int]] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    broken = []
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        name = list(commands)[number % len(commands)]
        words, output = commands[name]
        if name not in expected:
            fresh(folder)
            reading, writing = os.pipe()
            begun = time.perf_counter()
            status = ended(started(folder, words, output, 0, writing))
            seconds = time.perf_counter() - begun
            os.close(writing)
            if status:
                return outcomes, [f"{name}: exit status {status}"]
            expected[name] = content(folder / OUTPUT), seconds, int(os.read(reading, 99))
            os.close(reading)
        outcome, wrong = attempt(rng, folder, words, output, *expected[name])
        outcomes[outcome] += 1
        broken += [f"{number} ({name}): {each}" for each in wrong]
    return outcomes, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, broken = crash(options.count, options.seed, Path(folder))
    for line in broken:
        print(line)
    ends = ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items()))
    print(f"{options.count} conversions in {time.perf_counter() - begun:.0f} s: {ends}; {len(broken)} broken promises")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
