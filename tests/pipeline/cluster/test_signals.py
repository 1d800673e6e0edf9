import os
import signal
import threading

import pytest

from pipeline.cluster.signals import Stopped, stopping_on_signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_with_the_status_that_shells_have_for_it(number: int, status: int) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        with stopping_on_signals():
            os.kill(os.getpid(), number)
            threading.Event().wait(5)

    with pytest.raises(Stopped) as stop:
        work()
    assert stop.value.exit_status == status
    assert signal.getsignal(number) == before


def test_a_second_signal_is_not_held_up() -> None:
    def work() -> None:
        with stopping_on_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    with pytest.raises(Stopped):
        work()


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stopping_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
