import pytest

from pipeline.errors import InputError
from pipeline.redaction import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a.tar?X-Amz-Signature=abc&x=1", "https://host/a.tar"),
        ("https://user:secret@host/a.tar", "https://host/a.tar"),
        ("https://user:p@ss:w0rd@host:80/a@b.tar", "https://host:80/a@b.tar"),
        ("s3://key:secret@bucket/a.tar", "s3://bucket/a.tar"),
        ("https://host/a?ids=1,2;3&sig=[abc]d is gone", "https://host/a is gone"),
        ("https://host/a.tar?sig=abc: 48 bytes came", "https://host/a.tar: 48 bytes came"),
        (
            "read https://host/a.tar?sig=abc, then ('https://host/b?sig=c')",
            "read https://host/a.tar, then ('https://host/b')",
        ),
        ("s3://bucket/a#1.tar", "s3://bucket/a#1.tar"),
        ("simplecache::https://u:p@host/a?b", "simplecache::https://host/a"),
        ("two https://h/a?x=1 https://h/b?x=2.", "two https://h/a https://h/b."),
        ("/local/what?.tar", "/local/what?.tar"),
        ("file:///local/what?@x.tar", "file:///local/what?@x.tar"),
        ("mail a@b.c? Yes", "mail a@b.c? Yes"),
        ("", ""),
    ],
)
def test_credentials_and_queries_are_left_out(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(redact(text)) == expected


def test_errors_hold_no_credentials() -> None:
    assert str(InputError("https://u:p@h/a?sig=1 is gone")) == "https://h/a is gone"
