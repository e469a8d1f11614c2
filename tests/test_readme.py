"""What the README shows runs, and its file tree is the tree there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    code = re.search(r"test_readme\.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    hidden = names["hidden"]
    assert hidden.grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_the_reward_of_the_data_page_reads_texts_and_messages() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = re.search(r"test_readme\.py -->\n```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    texts = ["it is 4", "5", ""]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, messages):
        assert names["right"](["?"] * 3, completions, answer=["4", "4", "4"], other=[1, 2, 3]) == [1, 0, 0]


def test_the_file_tree_is_complete() -> None:
    tree = README[README.index("## The files") :]
    rooms = {
        path.name
        for path in (ROOT / "src" / "kedge").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    files = {path.name for path in (ROOT / "src" / "kedge").rglob("*.py") if path.name != "__init__.py"}
    missing = sorted(name for name in rooms | files if name not in tree)
    assert not missing
    named = re.findall(r"^\s+(\w+\.py)\b", tree, re.MULTILINE)
    assert sorted(set(named) - files) == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
