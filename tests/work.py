"""How much work a call is, counted and not timed: a busy machine changes nothing."""

import signal
import sys
from collections.abc import Callable

PATIENCE = 60  # seconds; what ends at all takes one in a hundred of them


def lines_run(work: Callable, *arguments, **options) -> int:
    """Lines of Python that ran. One call of C (a pattern, a power) has none: if it does not end, it
    fails after so many seconds of this process's own CPU time.
    """
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    def give_up(number, frame):
        raise TimeoutError(f"still at work after {PATIENCE} seconds, {lines} lines")

    tracer, handler = sys.gettrace(), signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    sys.settrace(count)
    try:
        work(*arguments, **options)
    finally:
        sys.settrace(tracer)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    return lines
