"""What runs README's blocks: order, messages of failures, and listings that name what is not there."""

from pathlib import Path

import pytest

from tests.e2e.readme.blocks import in_order, read_blocks, run
from tests.e2e.readme.listings import absent_entries

README = """# Title
## Use
```sh
cat out/a  # out/none is only a comment
```
```sh
cat out/a > out/again
```
## Make
```sh
mkdir -p out
echo made > --out out/a
```
"""


def test_blocks_come_after_those_that_make_what_they_read_and_in_the_order_of_their_section() -> None:
    blocks = read_blocks(README)
    assert [(block.section, block.line, block.language) for block in blocks] == [
        ("Use", 4, "sh"), ("Use", 7, "sh"), ("Make", 11, "sh"),
    ]  # fmt: skip
    assert [block.line for block in in_order(blocks)] == [11, 4, 7]
    assert blocks[2].makes == {"out/a"}
    assert blocks[0].reads == {"out/a"}
    circle = "```sh\nx out/a --out out/b\n```\n```sh\nx out/b --out out/a\n```\n"
    with pytest.raises(AssertionError, match="wait for each other"):
        in_order(read_blocks(circle))
    with pytest.raises(AssertionError, match=r"README\.md:2: a block that does not end"):
        read_blocks("```sh\nx\n")


def test_a_failing_block_names_readmes_line_the_command_and_what_was_printed(tmp_path: Path) -> None:
    shell, python = read_blocks("# A\n\n```sh\necho first\nls nowhere\necho last\n```\n```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match=r"README\.md:4 \(A\): exit status 2") as caught:
        run(shell, tmp_path, {})
    text = str(caught.value)
    assert "README.md:5: ls nowhere" in text
    assert text.count("last") == 2, (
        "once in the block, once in 'the last lines': the command after the failure did not run"
    )
    with pytest.raises(AssertionError, match=r'README_9\.py", line 9'):
        run(python, tmp_path, {})


def test_listings_name_what_is_not_there(tmp_path: Path) -> None:
    (listing,) = read_blocks(
        "```text\nhouse/\n  one.py two.py   things\n  seg/NAME.png    maps\n  lease.json      while a job runs\n"
        "  room/           a.py, b.py (and\n                  c.py)\n```\n"
    )
    (tmp_path / "house/seg").mkdir(parents=True)
    (tmp_path / "house/room/inner").mkdir(parents=True)
    for name in ("one.py", "seg/cat.png", "room/a.py", "room/inner/b.py"):
        (tmp_path / "house" / name).touch()
    absent = absent_entries(listing, tmp_path)
    assert [text.split(" ")[0] for text in absent] == ["house/two.py", "house/room/.../c.py"]
    (tmp_path / "house/seg/cat.png").unlink()
    assert absent_entries(listing, tmp_path)[1].startswith("house/seg/NAME.png")
