"""One way down: no room imports from a room above it, and no two rooms import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "kedge"

LEVELS = [
    {"errors"},
    {"divergence", "statistics"},
    {"head"},
    {"objective"},
    {"models", "runs"},
    {"rollout", "data", "rewards", "tasks", "recipes"},
    {"certify", "training", "measure", "report"},
    {"api", "cli", "__main__", "integrations"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SIDEWAYS = {("cli", "api"), ("__main__", "cli")}
"""Imports inside a level that are meant."""


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "kedge" and len(parts) > 1 else None


def imports(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            names = (
                [f"kedge.{alias.name}" for alias in node.names] if node.module == "kedge" else [node.module]
            )
            yield from ((node.lineno, name) for name in names)


def faults(file: Path, source: str) -> list[str]:
    found = []
    for line, module in imports(file):
        target = room_of(module)
        if target is None or target == source or target not in LEVEL:
            continue
        if LEVEL[target] >= LEVEL[source] and (source, target) not in SIDEWAYS:
            found.append(f"{file.name}:{line}: {source} imports {target}, which is not below it")
    return found


def files() -> list[tuple[Path, str]]:
    listed = []
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).parts
        if len(parts) > 1 or parts[0] not in ("__init__.py",):
            listed.append((file, parts[0].removesuffix(".py")))
    return listed


def test_every_room_has_a_level() -> None:
    assert {room for _, room in files()} <= set(LEVEL)


def test_imports_go_one_way_down() -> None:
    found = [fault for file, room in files() for fault in faults(file, room)]
    assert not found, "\n".join(found)


def test_the_test_can_fail(tmp_path: Path) -> None:
    climbing = tmp_path / "exact.py"
    climbing.write_text("from kedge.training import Recipe\n", encoding="utf-8")
    assert faults(climbing, "divergence") == [
        "exact.py:1: divergence imports training, which is not below it"
    ]


def module_graph() -> dict[str, set[str]]:
    trees = {}
    for file, _ in files():
        parts = ["kedge", *file.relative_to(SOURCE).with_suffix("").parts]
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            file.read_text(encoding="utf-8")
        )
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        top = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        targets = {f"{node.module}.{alias.name}" for node in top for alias in node.names}
        graph[name] = {target if target in trees else target.rpartition(".")[0] for target in targets}
    return graph


def test_no_circle_between_modules() -> None:
    graph = module_graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            pytest.fail(" → ".join([*path[path.index(name) :], name]))
        if name in done or name not in graph:
            return
        for target in graph[name]:
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())
