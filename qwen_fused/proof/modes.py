"""The places at which torch lets a call be watched, each handing it to a function."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# takes the function called, its arguments and its keyword arguments; gives the result
Handler = Callable[[Any, tuple, dict], Any]


class FunctionMode(TorchFunctionMode):
    """Hands over what the user calls: torch's functions, methods and attributes of tensors."""

    def __init__(self, handler: Handler):
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handler(func, args, kwargs or {})


class DispatchMode(TorchDispatchMode):
    """Hands over what computes: aten operations, below autograd."""

    supports_higher_order_operators = True

    def __init__(self, handler: Handler):
        super().__init__()
        self.handler = handler

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled meanwhile, and the guard against tracing would import dynamo, which takes seconds
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # scripted code arrives here without a function call around it
        with torch._C.DisableTorchFunction():
            return self.handler(func, args, kwargs or {})


@contextmanager
def on_apply(handler: Callable[[type, Callable[..., Any], tuple, dict], Any]) -> Iterator[None]:
    """Hand over this thread's calls of custom autograd Functions, which no mode sees."""
    original = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        # a classmethod of Python's, and of C's since torch 2.14
        bound = original.__get__(None, cls)
        if threading.get_ident() != thread:
            return bound(*args, **kwargs)
        return handler(cls, bound, args, kwargs)

    # there is no hook for it
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextmanager
def on_inference_mode(handler: Callable[[], None]) -> Iterator[None]:
    """Call the handler whenever inference mode, which no mode sees, is entered."""
    original = torch.inference_mode.__enter__

    def enter(switch: Any) -> Any:
        if switch.mode:
            handler()
        return original(switch)

    # nor for this
    torch.inference_mode.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.inference_mode.__enter__ = original  # type: ignore[method-assign]


@contextmanager
def on_thread(handler: Callable[[], None]) -> Iterator[None]:
    """Call the handler whenever another thread is started or given a task; modes see their own thread only."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def started(thread: Any, *args: Any, **kwargs: Any) -> Any:
        handler()
        return start(thread, *args, **kwargs)

    def submitted(pool: Any, *args: Any, **kwargs: Any) -> Any:
        handler()
        return submit(pool, *args, **kwargs)

    threading.Thread.start = started  # type: ignore[method-assign, assignment]
    ThreadPoolExecutor.submit = submitted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]


@contextmanager
def uncompiled(note: Callable[[Any], None] = lambda function: None) -> Iterator[None]:
    """Run the source of compiled functions and modules instead of their compiled code.

    Args:
        note: called with every function that would have run compiled.
    """
    # without dynamo there is nothing compiled, and importing it takes seconds
    if "torch._dynamo" not in sys.modules:
        yield
        return
    from torch._dynamo import eval_frame

    original = eval_frame._callback_from_stance

    def callback_of(callback: Any) -> Any:
        if callback not in (None, False):
            # the wrapper around the function, which holds it
            note(sys._getframe(1).f_locals.get("fn"))
        return original(callback)

    # nor for this
    eval_frame._callback_from_stance = callback_of
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        eval_frame._callback_from_stance = original
