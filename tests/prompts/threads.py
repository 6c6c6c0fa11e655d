# SPDX-License-Identifier: Apache-2.0
"""Threads that take turns far more often than Python lets them."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def frequent_turns() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def at_once(calls: Iterable[Callable[[], None]]) -> list[Exception]:
    """What the calls raise, each in a thread of its own."""
    errors: list[Exception] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    with frequent_turns():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors
