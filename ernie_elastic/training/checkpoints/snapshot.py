"""Copies of a run's state in host memory, so that a step can go on while they are written.

The engines write their state through `torch.save`. `diverted` keeps what they would write, with its path: each engine's
own format stays what it is, under any ZeRO stage, and what an engine writes in another way is written at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class HeldFile:
    """One file that is not written yet: what torch.save was given, copied to host memory."""

    path: Path
    value: Any
    options: dict[str, Any]

    def write(self) -> None:
        """Write it, and wait until the disk has it."""
        with open(self.path, "wb") as stream:
            torch.save(self.value, stream, **self.options)
            stream.flush()
            os.fsync(stream.fileno())


class HostCopies:
    """Copies of tensors on the CPU, whose memory the next snapshot uses again.

    New pages cost more than the copy itself (0.4 against 5 GB/s on a virtual machine), so they are kept: a run with
    snapshots holds its state once more in host memory. Pinned beside an accelerator.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []
        self._pin = torch.cuda.is_available()

    def begin(self) -> None:
        """Start a snapshot; the one before must have been written."""
        for tensor in self._used:
            self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        self._used.clear()

    def end(self) -> None:
        """Wait for the copies, and give back memory that this snapshot did not need."""
        if self._pin:
            torch.cuda.synchronize()
        self._free.clear()

    def tensor(self, source: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of a tensor of any shape, in `dtype` or its own."""
        wanted = dtype or source.dtype
        free = self._free.get((source.shape, wanted))
        target = free.pop() if free else torch.empty(source.shape, dtype=wanted, pin_memory=self._pin)
        target.copy_(source.detach(), non_blocking=self._pin)
        self._used.append(target)
        return target

    def tree(self, value: Any, seen: dict[Any, torch.Tensor] | None = None) -> Any:
        """A copy of nested dicts, lists and tuples with tensors of any shape; one that occurs twice stays one."""
        seen = {} if seen is None else seen
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.device, value.shape, value.stride(), value.dtype)
            if value.numel() == 0 or key not in seen:
                seen[key] = self.tensor(value)
            return seen[key]
        if isinstance(value, dict):
            new = copy.copy(value)  # keeps the class and what a state_dict carries as an attribute
            for name, item in value.items():
                new[name] = self.tree(item, seen)
            return new
        if isinstance(value, (list, tuple)):
            items = [self.tree(item, seen) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return copy.deepcopy(value)


@contextmanager
def diverted(copies: HostCopies) -> Iterator[list[HeldFile]]:
    """While this lasts, `torch.save` to a path copies to host memory and notes the file; yields the notes.

    Only the thread that trains may save meanwhile: the writer of the snapshot before must have ended.
    """
    held: list[HeldFile] = []
    original: Callable[..., None] = torch.save

    def hold(value: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if arguments or not isinstance(file, (str, os.PathLike)):
            original(value, file, *arguments, **options)
        else:
            held.append(HeldFile(Path(file), copies.tree(value), options))

    torch.save = hold  # type: ignore[assignment]
    try:
        yield held
    finally:
        torch.save = original
