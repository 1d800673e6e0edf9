"""Takes credentials out of texts: what is stored, printed or raised holds none."""

import re

__all__ = ["redact"]

# A URL's user and password, and its query, which is where signatures travel. A query ends at white space or a quote, so
# that no part of it stays; punctuation at its end is the sentence's.
_URL = r"\b(?!file:)[A-Za-z][A-Za-z0-9+.-]*://"
_USER = re.compile(rf"(?P<scheme>{_URL})[^\s/?#'\"<>]*@")
_QUERY = re.compile(rf"(?P<url>{_URL}[^\s?'\"<>]*)\?[^\s'\"<>]*?(?=[)\],;.:]*(?:[\s'\"<>]|$))")


def redact(text: str) -> str:
    """The text with the user, the password and the query of every URL in it left out.

    ``https://user:secret@host/a.tar?X-Amz-Signature=...`` becomes ``https://host/a.tar``. A local path, also as a
    ``file:`` URL, stays as it is.
    """
    return _QUERY.sub(r"\g<url>", _USER.sub(r"\g<scheme>", text))
