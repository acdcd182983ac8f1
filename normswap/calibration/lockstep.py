"""Forward passes that wait for each other.

A :class:`Pass` runs in a thread of its own and stops at every call of :meth:`Pass.meet` until it is resumed with an
answer. Only one thread runs at a time, the caller's or that of one pass, so that everything happens in one order, given
by the caller. Threads, not coroutines: what a ``forward`` sets for its thread (autocast, gradients) stays its own. What
it finds set is the caller's: context variables, and the condition that layers were given. What it leaves in the model
is its own too, see :mod:`normswap.calibration.overlay`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import torch

from normswap.calibration.overlay import Overlay
from normswap.norms.condition import as_caller

_local = threading.local()


class _Abandoned(BaseException):
    """Unwinds a pass that nobody waits for any more."""


def current() -> Pass | None:
    """The pass whose thread this is."""
    return getattr(_local, "current", None)


class Pass:
    """One call of ``run``, which has not begun yet. ``name`` and ``batch`` are the caller's marks; ``overlay`` is
    of the model that it runs."""

    def __init__(self, run: Callable[[], Any], name: str, batch: int, overlay: Overlay) -> None:
        self.name, self.batch, self.overlay = name, batch, overlay
        self.calls: Counter[Hashable] = Counter()
        """How often each key was met."""
        self.waits: tuple[Hashable, int] | None = None
        """The key and the number of the call at which it stands."""
        self.value: Any = None
        """What it brought there."""
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._answer: Any = None
        self._abandoned = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._enter = _thread_state()
        with as_caller():
            context = copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._main, run), daemon=True)
        self._started = False

    def resume(self, answer: Any = None) -> None:
        """Let it run until it meets the next key or ends; raises what it raised."""
        self._answer, self.waits, self.value = answer, None, None
        self.overlay.enter()
        try:
            if not self._started:
                self._started = True
                self._thread.start()
            self._go.release()
            self._back.acquire()
        finally:
            self.overlay.leave()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def meet(self, key: Hashable, value: Any) -> Any:
        """Called within the pass: wait at ``key`` and return the answer."""
        self.waits, self.value = (key, self.calls[key]), value
        self.calls[key] += 1
        self._wait()
        return self._answer

    def abandon(self) -> None:
        """End it where it stands."""
        if self._started and not self.done:
            self._abandoned = True
            self.overlay.enter()
            self._go.release()
            self._thread.join()
            self.overlay.leave()
        elif self._started:
            self._thread.join()

    def _wait(self) -> None:
        if self._abandoned:  # code on the way out met something else
            raise _Abandoned
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def _main(self, run: Callable[[], Any]) -> None:
        self._go.acquire()
        _local.current = self
        try:
            with self._enter():
                self.result = run()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._back.release()


def _thread_state() -> Callable[[], ExitStack]:
    """What enters, in a new thread, the state that torch keeps for each thread, as it is here, without gradients."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
    default = torch.get_default_device()
    device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        for kind, dtype, enabled in casts:
            if enabled:
                stack.enter_context(torch.autocast(kind, dtype))
        if default.type != "cpu":
            stack.enter_context(default)
        if device is not None:
            stack.enter_context(torch.cuda.device(device))
        return stack

    return enter
