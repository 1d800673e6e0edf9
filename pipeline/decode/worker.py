"""Decoding in a child process, so that a time limit can end it and a crash of a decoder harms one sample only.

``DecoderProcess`` sends the members of a sample to a child process, one sample at a time. The child is this module, run
as a program. It imports only decoding modules.
"""

import sys
from collections.abc import Mapping

from pipeline.child import ATTEMPTS, ChildCrashedError, ChildProcess, ChildTimeoutError, serve
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import PreparedSample, prepare_sample
from pipeline.errors import Reason, SampleError

__all__ = ["DecoderProcess"]


class DecoderProcess:
    """A child process that decodes samples; it starts with the first one and is replaced when it ends.

    Safe to call from several threads; they are served one after the other.
    """

    def __init__(self, python: str = sys.executable) -> None:
        """
        Args:
            python: the interpreter of the child.
        """
        self._process = ChildProcess("pipeline.decode.worker", "decoder", python)

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is no child."""
        return self._process.pid

    def prepare(self, members: Mapping[str, bytes], options: DecodeOptions) -> PreparedSample:
        """What :func:`pipeline.decode.sample.prepare_sample` returns, within ``options.decode_timeout`` seconds.

        Raises:
            SampleError: that of ``prepare_sample``; ``DECODE_TIMEOUT``; ``UNDECODABLE`` when the decoder crashed.
            EnvironmentFault: the child process cannot be started.
        """
        try:
            sample: PreparedSample = self._process.ask((dict(members), options), options.decode_timeout)
        except ChildTimeoutError as error:
            raise SampleError(
                Reason.DECODE_TIMEOUT,
                f"decoding takes longer than decode_timeout = {options.decode_timeout:g} s; raise "
                "decode_timeout if such files are meant to be in the data",
            ) from error
        except ChildCrashedError as error:
            raise SampleError(
                Reason.UNDECODABLE,
                f"the decoder crashed on it {ATTEMPTS} times, its process ended with {error}: the file is "
                "damaged in a way that the decoder does not survive, or memory ran out; encode the file again, or "
                "lower max_pixels",
            ) from error
        return sample

    def close(self) -> None:
        """End the child process. A later sample starts another one."""
        self._process.close()


def _prepare(request: tuple[Mapping[str, bytes], DecodeOptions]) -> PreparedSample:
    return prepare_sample(*request)


if __name__ == "__main__":
    serve(_prepare)
