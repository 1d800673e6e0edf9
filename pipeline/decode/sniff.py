"""File types by their first bytes."""

import re

__all__ = ["sniff"]


_SIGNATURES = tuple(
    (kind, re.compile(pattern, re.DOTALL))
    for kind, pattern in (
        ("jpeg", rb"\xff\xd8\xff"),
        ("png", rb"\x89PNG\r\n\x1a\n"),
        ("gif", rb"GIF8[79]a"),
        ("webp", rb"RIFF....WEBP"),
        ("bmp", rb"BM.{12}[\x0c\x28-\x80]\0\0\0"),
        ("tiff", rb"II[*+]\0|MM\0[*+]"),
        ("ppm", rb"P[1-6][ \t\r\n#]"),
        ("avif", rb"....ftyp(?:....){0,12}avi[fs]"),
        ("jp2", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        ("heic", rb"....ftyp(?:hei[cmsx]|hev[cmx]|mif1|msf1)"),
        ("jxl", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
        ("psd", rb"8BPS\0"),
        ("exr", rb"\x76\x2f\x31\x01"),
        ("pdf", rb"%PDF-"),
        ("html", rb"(?:\xef\xbb\xbf)?\s*<(?i:!doctype|html|head|body|\?xml|svg|error)"),
    )
)


def sniff(data: bytes) -> str | None:
    """The file type by its first bytes: ``jpeg``, ``png``, ``heic``, ``html`` ...; None when unknown."""
    return next((kind for kind, pattern in _SIGNATURES if pattern.match(data)), None)
