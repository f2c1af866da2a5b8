"""The Python examples of docs/retrieval.md run, in order, in one namespace."""

import re
from pathlib import Path


def test_examples_of_the_page_run():
    text = (Path(__file__).parent.parent / "docs" / "retrieval.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "docs/retrieval.md", "exec"), namespace)
