"""A process that runs `prepare_data` and may kill itself: TOKENIZERS DATA OUT WORKERS MOMENT.

MOMENT n: SIGKILL just before the n-th of the calls that make files last or give them their names; 0: never, and their
number is printed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_elastic.data.prepare import PrepareConfig, prepare_data
from tests.support.tiny_tokenizers import tiny_layout

CALLS = ("fsync", "replace", "rename")


def config(data: Path, num_workers: int, **changes: Any) -> PrepareConfig:
    """What every run of the kill test prepares."""
    return PrepareConfig(
        data=str(data), num_records=0, row_length=64, records_per_shard=4, num_workers=num_workers,
        max_reject_share=0.2, text_dropout=0.1, **changes,
    )  # fmt: skip


def die_at(moment: int) -> list[int]:
    """Count the calls, and die at one of them."""
    count = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return count


if __name__ == "__main__":
    tokenizers, data, out = (Path(word) for word in sys.argv[1:4])
    calls = die_at(int(sys.argv[5]))
    prepare_data(tokenizers, out, config(data, int(sys.argv[4])), tiny_layout(tokenizers))
    print(f"calls {calls[0]}")
