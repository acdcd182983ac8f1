"""Several processes that write one checkpoint together, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist

from normswap.errors import NormswapError


def rank() -> int:
    return dist.get_rank() if together() else 0


def world() -> int:
    return dist.get_world_size() if together() else 1


def together() -> bool:
    """Whether this process is one of several that know each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def launched() -> bool:
    """Whether ``torchrun`` started several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """Let the processes that ``torchrun`` started know each other; only the first is heard."""
    if not launched() or not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        with ExitStack() as stack:
            if dist.get_rank() != 0:
                silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(silence))
                stack.enter_context(redirect_stderr(silence))
            yield
    finally:
        dist.destroy_process_group()


def shared(value: Any) -> Any:
    """The first process's value."""
    if not together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Every process's value."""
    if not together():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def agree(error: BaseException | None) -> None:
    """Raise in every process where one of them failed: its own error there, else who failed and why."""
    failed = [text for text in gathered(None if error is None else str(error) or type(error).__name__) if text]
    if error is not None:
        raise error
    if failed:
        raise NormswapError(f"another process failed: {failed[0]}")
