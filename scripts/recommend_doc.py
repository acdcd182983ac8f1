"""Writes ``docs/recommend.md`` from the rules of ``normswap/advice/rules.py``: ``python scripts/recommend_doc.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from normswap.advice.rules import RULES, WEIGHTS, Rule

PATH = Path(__file__).resolve().parent.parent / "docs" / "recommend.md"
HEAD = """# Which norm, and why

Written by `python scripts/recommend_doc.py` from `normswap/advice/rules.py`.

```sh
normswap recommend --model package.module:callable --task classification --batch-size 4 --input 1x3x224x224
normswap compare --model package.module:callable --input 1x3x224x224
```

`recommend` looks at the model (its layers, the kind and place of its norms, the rank of their input, how many would
fold away) and at what is done with it, shows every rule that holds, and prints the command to run. `compare` converts
copies of the model to each kind and measures time, memory and parameters on the given input, in turns. In Python:

```python
import normswap
import torch
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
advice = normswap.recommend(model, task="classification", batch_size=4)
print(advice.winner.kind, advice.runner_up.kind, advice.command())
print(normswap.compare(model, (torch.randn(4, 3, 16, 16),), ["batch", "group"], repeats=3))
```

## How the rules add up

"""


def sentence(weights: dict[str, int]) -> str:
    must, should, may = (weights[name] for name in ("must", "should", "may"))
    return (
        f"A rule adds its weight (must {must}, should {should}, may {may}) to the kind that it takes first and 1 to\n"
        "those after it, and takes its weight from those it avoids; what a *must* avoids is out. The kind with the\n"
        "most is recommended, of equal ones the one that some rule takes first, then that of the earlier rule, if any\n"
        "norm of the model can become it. What is not known meets no condition. Rules that ask for another kind are\n"
        "told as conflicts.\n"
    )


def row(rule: Rule) -> str:
    take, avoid = (", ".join(f"`{kind}`" for kind in kinds) for kinds in (rule.take, rule.avoid))
    cells = (rule.name, rule.condition, take, avoid, rule.strength, rule.reason, rule.source)
    return "| " + " | ".join(cells) + " |"


def lines() -> Iterator[str]:
    yield HEAD + sentence(dict(WEIGHTS))
    yield "| rule | holds if | take, else | avoid | it | because | source |"
    yield "|---|---|---|---|---|---|---|"
    yield from map(row, RULES)


def document() -> str:
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
