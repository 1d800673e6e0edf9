"""Numbers as people read them."""

import time

__all__ = ["human_bytes", "human_seconds", "report_time"]


def human_bytes(count: float) -> str:
    """``1.5 GB``: decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        text = f"{count:.0f}" if unit == "B" else f"{count:.1f}"
        if abs(float(text)) < 1000:
            return f"{text} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def human_seconds(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def report_time(text: str, started: float) -> None:
    """Print what was done and the seconds since ``started``, of ``time.perf_counter``."""
    print(f"{text} ({time.perf_counter() - started:.1f} s)", flush=True)
