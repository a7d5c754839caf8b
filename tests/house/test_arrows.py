"""The house: which room may import which, no circles, one name for one thing. Read from the source."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import sa_convert

HOME = Path(sa_convert.__file__).parent

ROOMS = (
    "commands", "jobs", "search", "heal", "observe", "measure", "sessions", "present", "plan", "treatments", "rewrite",
    "models", "read", "families", "texts", "output", "domain", "console", "runtime",
)  # fmt: skip
"""From the top to the bottom: each may import those after it, and never one before it."""

BESIDE = {"registration": "commands", "treated_classes": "commands", "errors": "runtime"}
"""Files outside of the rooms, and the room beside which they stand."""

FILES = {
    ".".join(("sa_convert", *path.relative_to(HOME).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(HOME.rglob("*.py"))
}
"""Every module by its full name."""

TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imported(module: str, later: bool = True) -> Iterator[str]:
    """Modules of ours that a module imports when it is imported or run; what only a type checker reads is left out.
    later: those that functions import, too."""
    for node in _nodes(TREES[module], later):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
            names = [f"{source}.{name.name}" for name in node.names]
            yield from {name if name in FILES else source for name in names if name in FILES or source in FILES}


def _nodes(tree: ast.AST, later: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if later or not isinstance(node, ast.FunctionDef):
            yield node
            yield from _nodes(node, later)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def room(module: str) -> str | None:
    """None for the package itself, which has the version, and for what starts it."""
    name = module.split(".")[1] if "." in module else ""
    name = BESIDE.get(name, name)
    return name if name in ROOMS else None


def test_every_folder_is_a_room():
    assert {path.parent.name for path in HOME.glob("*/__init__.py")} <= set(ROOMS)


def test_arrows_run_down():
    up = [
        f"{module} imports {other}"
        for module in FILES
        for other in imported(module)
        if room(module) and room(other) and ROOMS.index(room(other)) < ROOMS.index(room(module))
    ]
    assert not up


def test_no_circles():
    """Files are taken away that import none of those that are left; what stays is a circle, or leads to one."""
    left = {module: set(imported(module)) - {module} for module in FILES}
    while free := [module for module, needs in left.items() if not needs & set(left)]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("job", ["inspecting", "converting", "analyzing", "benchmarking", "timing_turns", "pushing"])
def test_what_headers_tell_is_told_before_torch_is_loaded(job):
    """Loading torch and transformers takes seconds: nothing imports them before it needs them."""
    needed: set[str] = set()
    new = {f"sa_convert.jobs.{job}", "sa_convert.commands.main"}
    while new:
        needed |= new
        new = {other for module in new for other in imported(module, later=False)} - needed
    heavy = {"torch", "transformers", "matplotlib", "pydantic"}
    for module in needed:
        nodes = list(_nodes(TREES[module], False))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not heavy & {name.partition(".")[0] for name in names}, module


@pytest.mark.parametrize("module", [module for module in FILES if FILES[module].name == "__init__.py" and room(module)])
def test_every_folder_says_what_it_answers_and_who_may_import_it(module):
    assert not list(imported(module))
    if room(module) != "runtime":  # which travels, and has a word of its own
        _, who, _ = filter(None, ast.get_docstring(TREES[module]).splitlines())
        above = ROOMS[: ROOMS.index(room(module))]
        assert (f"`{above[-1]}`" if above else "No room") in who


def test_no_two_files_have_one_name():
    """But for fixed sets: every folder has `__init__.py`, and every treatment the same files."""
    names = defaultdict(list)
    for module, path in FILES.items():
        if path.name != "__init__.py" and not module.startswith("sa_convert.treatments."):
            names[path.name].append(module)
    assert not {name: modules for name, modules in names.items() if len(modules) > 1}


def test_no_two_classes_have_one_name():
    """What travels is left out: a treatment's class there has the treatment's name."""
    names = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and room(module) != "runtime":
                names[node.name].append(module)
    assert not {name: modules for name, modules in names.items() if len(modules) > 1}


def test_what_takes_many_arguments_takes_them_by_name():
    """Six by position at the most. Left out: what travels, commands (click names their arguments), and functions that
    others call with arguments of their own choice."""
    many = [
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and len([name for name in node.args.args if name.arg not in ("self", "cls")]) > 6
        if room(module) not in ("runtime", "commands") and node.name != "attend"
    ]
    assert not many


def test_what_texts_mention_is_there():
    """Modules, and functions and classes in them, as docstrings and pages name them."""
    root = HOME.parent
    pages = [*FILES.values(), *root.glob("*.md"), *root.glob("docs/*.md")]
    named = {
        name for page in pages for name in re.findall(r"`(sa_convert(?:\.\w+)+)`", page.read_text(encoding="utf-8"))
    }
    assert named
    for name in named:
        module, _, member = name.rpartition(".")
        members = [getattr(node, "name", None) for node in TREES[module].body] if module in FILES else []
        assert name in FILES or member in members, name
