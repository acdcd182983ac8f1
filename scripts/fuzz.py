"""Fold many random networks and compare them with the originals in float64.

    python scripts/fuzz.py --count 10000 --seed 0 [--generator steps|source|both]

``steps`` are the networks of ``tests.fuzzing``, ``source`` those of ``tests.fuzzing_source``, ``both`` takes turns.
Exits with 1 when any is wrong or crashes, with the seeds: ``check(seed)`` of the generator repeats one exactly. Keep
such a seed in ``tests/test_fuzz.py``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests import fuzzing, fuzzing_source

GENERATORS: dict[str, Callable[[int], fuzzing.Tally]] = {"steps": fuzzing.check, "source": fuzzing_source.check}


@dataclass
class Report:
    """What a generator's networks showed."""

    networks: int = 0
    total: fuzzing.Tally = field(default_factory=fuzzing.Tally)
    bad: dict[int, str] = field(default_factory=dict)

    def take(self, seed: int, check: Callable[[int], fuzzing.Tally]) -> str | None:
        """Check one network; what is wrong with it."""
        self.networks += 1
        try:
            tally = check(seed)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            self.bad[seed] = f"{type(error).__name__}: {lines[0]}"
            return self.bad[seed]
        self.total.foldable += tally.foldable
        self.total.folded += tally.folded
        self.total.error = max(self.total.error, tally.error)
        self.total.noise += tally.noise
        return None

    def __str__(self) -> str:
        total = self.total
        return (
            f"{self.networks} networks, {len(self.bad)} wrong or crashed; {total.folded} of {total.foldable} norms "
            f"with fixed statistics folded ({total.folded / max(1, total.foldable):.1%}); "
            f"largest relative error {total.error:.1e}, but for {total.noise} outputs of rounding noise alone"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000, help="networks in all")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--generator", choices=(*GENERATORS, "both"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = list(GENERATORS) if options.generator == "both" else [options.generator]
    reports = {name: Report() for name in names}
    started = time.perf_counter()
    try:
        for number in range(options.count):
            name = names[number % len(names)]
            seed = options.seed + number // len(names)
            if (problem := reports[name].take(seed, GENERATORS[name])) is not None:
                print(f"{name} {seed}: {problem}", flush=True)
            if (number + 1) % 500 == 0:
                bad = sum(len(report.bad) for report in reports.values())
                print(f"{number + 1} networks, {bad} bad, {time.perf_counter() - started:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted; so far:", flush=True)
    for name, report in reports.items():
        print(f"{name}, from seed {options.seed}: {report}")
    return 1 if any(report.bad for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
