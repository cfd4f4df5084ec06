"""Timings kept on disk, so that a machine measures a layer once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

VARIABLE = "LOWRANK_NN_CACHE"
"""Environment variable with the folder of the cache; ``off`` keeps nothing."""

_FORMAT = 1
_MOST_ENTRIES = 20_000  # per file: some megabytes
_MOST_FILES = 32


class TimingCache:
    """Milliseconds by key, in one JSON file for each machine and setting.

    A cache is a convenience: a file that is damaged, foreign or cannot be written is passed over with a log message.

    Args:
        context: What timings depend on besides their keys: processor, versions, threads.
    """

    def __init__(self, context: Mapping[str, Any]) -> None:
        self.context = dict(context)
        digest = hashlib.sha256(json.dumps(self.context, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_folder()
        self.path = None if folder is None else folder / f"timings-{digest}.json"

    def load(self) -> dict[str, float]:
        """Return the timings of earlier runs; none if there is no usable file."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            return _checked(stored, self.context)
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("timing cache %s is not usable and is ignored: %s", self.path, error)
            return {}

    def store(self, timings: Mapping[str, float]) -> None:
        """Add timings, which replace older ones of the same key; the oldest entries go where there are too many."""
        if self.path is None or not timings:
            return
        old = {key: time for key, time in self.load().items() if key not in timings}
        entries = dict([*old.items(), *timings.items()][-_MOST_ENTRIES:])
        content = json.dumps({"format": _FORMAT, "context": self.context, "milliseconds": entries})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self.path, content)
            _drop_oldest(self.path.parent)
        except OSError as error:
            _warn_once(f"timing cache {self.path} cannot be written: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning that every further write would repeat."""
    logger.warning(message)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what timings on ``device`` depend on besides the work: processor, threads, version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "processor": name,
        "capability": capability,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """Return the processor's name, as far as the platform tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path | None:
    """Return the folder of the cache, ``$LOWRANK_NN_CACHE`` or the platform's; None where it is off or has no place."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "lowrank_nn"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "lowrank_nn" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "lowrank_nn"


def clear_timing_cache() -> None:
    """Forget all timings that earlier runs kept on disk.

    They lie in the folder that the environment variable ``LOWRANK_NN_CACHE`` names, else in the user's cache folder;
    with ``LOWRANK_NN_CACHE=off`` nothing is read or kept.
    """
    folder = cache_folder()
    for path in folder.glob("timings-*.json") if folder is not None else ():
        path.unlink(missing_ok=True)


def _checked(stored: Any, context: dict[str, Any]) -> dict[str, float]:
    """Return the entries of a file's content.

    Raises:
        ValueError: It is not what :meth:`TimingCache.store` writes.
    """
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT or stored.get("context") != context:
        raise ValueError("another format or another machine's")
    entries = stored.get("milliseconds")
    if not isinstance(entries, dict):
        raise ValueError("no timings in it")
    for time in entries.values():
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not (math.isfinite(time) and time > 0):
            raise ValueError(f"a time of {time!r} ms")
    return entries


def _write(path: Path, content: str) -> None:
    """Write a file whole or not at all: other processes may read or write it at the same time."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".timings-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.glob("timings-*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_MOST_FILES]:
        path.unlink(missing_ok=True)
