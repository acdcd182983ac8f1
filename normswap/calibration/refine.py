"""Distillation of the affines: what the closed form leaves, a few steps of gradient descent bring nearer.

The weights and biases of the fitted norms, in at least float32 and outside of the model, are trained by Adam so that
the model's output is like the reference's: mean squared difference of each floating output tensor, in units of its
variance over the batch, without masked positions. Where the outputs cannot be compared there is nothing to learn from,
and that is an error.
No other parameter gets a gradient, unless the weights of linear layers and 1 x 1 convolutions are to move too
(:mod:`normswap.calibration.layers`): a norm of another kind loses what no affine brings back, and they can make up for
more of it. They have many more numbers to learn, and so need more inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normswap.calibration import processes
from normswap.calibration.agreement import telling
from normswap.calibration.batches import floats, run
from normswap.calibration.layers import Moved, stepping, zeros
from normswap.calibration.run import Session
from normswap.calibration.taps import tapped
from normswap.calibration.trial import Trial
from normswap.calibration.write import written
from normswap.errors import NormswapError
from normswap.graph.observe import eval_mode

RATE = 0.1
"""Adam's first step moves a weight by about this much, times the square root of the share that is not explained yet;
normalized values and outputs are of order one."""


def refined(session: Session, start: Trial, batches: Iterable[Any], steps: int, layers: Sequence[Moved] = ()) -> Trial:
    """The trial after ``steps`` steps from ``start``, one batch of each process a step, measured on all batches.
    ``layers`` get another weight too."""
    masters, moves = _masters(start), zeros(layers)
    leaves = [*(tensor for pair in masters for tensor in pair), *moves]
    optimizer = torch.optim.Adam(leaves, _rate(start.agreement.score()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    assert session.reference is not None
    with ExitStack() as stack:
        stack.enter_context(eval_mode(session.model))
        stack.enter_context(eval_mode(session.reference))
        stack.enter_context(
            tapped(
                session.sites,
                session.linear,
                lambda index, x: start.values[index],
                lambda index, z: masters[index],
                start.corrected,
            )
        )
        stack.enter_context(stepping(layers, moves))
        data = _forever(batches)
        for _ in range(steps):
            gradients = _step(session, next(data), leaves)
            for tensor, gradient in zip(leaves, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
            schedule.step()
    values = [
        replace(old, weight=weight.detach().double(), bias=bias.detach().double())
        for old, (weight, bias) in zip(start.values, masters, strict=True)
    ]
    trial = Trial("refined", None, session.sites, session.linear, values, start.corrections, refits=True)
    trial.moved = [each for each in map(Moved.by, layers, moves) if each.changes]
    with written([pair for each in trial.moved for pair in each.writes()]):
        session.go_through(batches, [trial])
    return trial


def _rate(score: float) -> float:
    left = 1.0 if math.isnan(score) else min(1.0, max(0.01, 1 - score))
    return RATE * math.sqrt(left)


def _masters(start: Trial) -> list[tuple[Tensor, Tensor]]:
    masters = []
    for site, values in zip(start.sites, start.values, strict=True):
        dtype = torch.promote_types(torch.float32, next(iter(site.norm.tensors.values())).dtype)
        pair = []
        for value, present in ((values.weight, site.norm.weight), (values.bias, site.norm.bias)):
            pair.append(value.to(dtype, copy=True).requires_grad_(present is not None))
        masters.append((pair[0], pair[1]))
    return masters


def _forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise NormswapError("batches is empty: refine needs at least one in every process")


def _loss(output: Tensor, original: Tensor) -> Tensor:
    kept = telling(original)
    error = (output.double() - original).where(kept, 0).square().sum() / kept.sum().clamp(min=1)
    return error / original[kept].double().var(correction=0).nan_to_num(nan=1.0).clamp(min=1e-12)


def _step(session: Session, batch: Any, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of all leaves, averaged over processes; ``None`` for one that is fixed."""
    assert session.reference is not None
    with torch.no_grad():
        originals = floats(run(session.reference, batch, session.forward))
    with torch.enable_grad():
        outputs = floats(run(session.model, batch, session.forward))
        losses = [
            _loss(output, original.to(output.device))
            for output, original in zip(outputs, originals, strict=False)
            if output.shape == original.shape and output.requires_grad
        ]
        if not losses:
            raise NormswapError(
                "refine compares the outputs of the two models, which have no floating tensors to compare"
            )
        loss = torch.stack(losses).mean()
    trained = [tensor for tensor in leaves if tensor.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    pairs = zip(trained, found, strict=True)
    packed = torch.cat([(torch.zeros_like(t) if g is None else g).double().flatten() for t, g in pairs])
    world = len(processes.gathered(None))
    parts = iter((processes.total(packed) / world).split([tensor.numel() for tensor in trained]))
    return [next(parts).reshape(t.shape).to(t) if t.requires_grad else None for t in leaves]
