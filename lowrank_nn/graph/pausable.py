"""A function that can be stopped in the middle and gone on with later, whatever it has called by then."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch
from typing_extensions import Self

from lowrank_nn.accelerator import device_types

Item = TypeVar("Item")


class Closed(BaseException):
    """Raised inside a body that is not to go on; no ``Exception``, so that a body's own handlers let it pass."""


class Pausable(Generic[Item]):
    """An iterator over what a function hands out wherever it calls ``pause``.

    As a generator, but ``pause`` may be called from any depth, such as from a module deep in a model's forward: the
    function runs in a thread of its own. Only one of the two threads works at any time. An error in the function comes
    out of ``next``.

    Args:
        body: Called with ``pause``, a function that hands out its argument and returns when the iterator is asked for
            the next item.
        settings: Entered around the body, in its thread; see :func:`settings_of_this_thread`.
    """

    def __init__(
        self,
        body: Callable[[Callable[[Item], None]], None],
        settings: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._body, self._settings = body, settings
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._items: list[Item] = []
        self._error: BaseException | None = None
        self._closing = self._ended = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="lowrank_nn run", daemon=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._items:
            return self._items.pop()
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """End the body where it stands, and its thread; does nothing after the end."""
        self._closing = True
        self._go.release()
        if self._thread.ident is not None:
            # It waits for its turn, or still works where an interrupt came while this thread waited for it.
            self._thread.join()
        self._ended = True
        self._items.clear()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._closing:
                with self._settings():
                    self._body(self._pause)
        except Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._back.release()

    def _pause(self, item: Item) -> None:
        if not self._closing:
            self._items.append(item)
            self._back.release()
            self._go.acquire()
        if self._closing:
            raise Closed


def settings_of_this_thread(intraop_threads: int | None = None) -> Callable[[], AbstractContextManager[None]]:
    """Return what enters, in another thread, the settings that torch keeps per thread, as they are in this one now.

    These are grad and inference mode, autocast, the default device, and the CUDA device and stream in use.

    Args:
        intraop_threads: Threads that one operation may use there; None for as many as here.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in device_types() if torch.is_autocast_enabled(kind)]
    device = torch.get_default_device()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if device.type != "cpu":
                stack.enter_context(device)
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            if intraop_threads is not None:
                torch.set_num_threads(intraop_threads)
            yield

    return enter
