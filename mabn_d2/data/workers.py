"""Loader workers that end by no signal but their parent's."""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader


def end_with_parent(worker: int) -> None:
    """Loader workers end when their parent says so or is gone, by no signal of others.

    SIGTERM and SIGINT go to the whole process group, where the trainer finishes its iteration
    first, for which it needs them. The parent's own SIGTERM is how Python ends workers at exit, so
    it can't simply be ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _start_worker(own: Callable[[int], None] | None, worker: int) -> None:
    if own is not None:
        own(worker)
    end_with_parent(worker)


def guard_workers(loader: Any) -> Any:
    """Return a loader, its workers ending as `end_with_parent` says, after what they do at their start.

    Args:
        loader: a DataLoader, or Detectron2's wrapper of one; others stay as they are.
    """
    inner = loader
    while not isinstance(inner, DataLoader):
        inner = getattr(inner, "dataset", getattr(inner, "_dataset", None))
        if inner is None:
            return loader
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader
