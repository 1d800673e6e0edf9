"""The child process that looks through videos and decodes their frames, run as a program."""

from pipeline.child import serve
from pipeline.inputs.frames import FrameQuestion, FrameTable, read_ppm, read_table


def _answer(question: FrameQuestion | str) -> FrameTable | bytes:
    """The frames of a video, by its path, or one of them."""
    return read_table(question) if isinstance(question, str) else read_ppm(question)


if __name__ == "__main__":
    serve(_answer)
