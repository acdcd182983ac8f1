"""Processes for tests: each a fork of one server that has imported what is slow to import, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
import typer.testing  # noqa: F401
from torch import multiprocessing as mp

import normswap.cli  # noqa: F401
import tests.support  # noqa: F401


def launch(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in ``world`` processes; raises what one of them raises."""
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    mp.start_processes(function, args=arguments, nprocs=world, start_method="forkserver")
