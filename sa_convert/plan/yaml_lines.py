"""YAML with the line of every key and item, so that whatever is wrong with a recipe can be named by its line."""

import re
from typing import Any

from sa_convert.errors import RecipeError

Path = tuple[str | int, ...]
Lines = dict[Path, int]

_MAX_DEPTH = 20
_NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)


def parse_yaml(text: str, file: str, *, numbers: bool = False) -> tuple[Any, Lines]:
    """The one document in `text`, and the line (from 1) of each key and list item by its path.

    numbers: keys in quotes that are whole numbers are these numbers, since JSON has no others.
    Plain data only. Numbers, booleans and null are those of YAML 1.2 (so 010, 1:30 and no stay text). Tags are
    refused, and aliases, since a few of them can stand for a document of any size. Raises RecipeError with the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            for mark, name in (("anchor", "anchors and aliases (&name, *name)"), ("tag", "tags (!name)")):
                if getattr(event, mark, None):
                    problem = f"{name} are not supported; write plain values"
                    raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
            return super().compose_node(parent, index)

    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?", list("-+0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})\\Z"), first)

    lines: Lines = {}

    def build(node: Any, path: Path) -> Any:
        if len(path) > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "nested too deeply for a recipe", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, child in enumerate(node.value):
                place = (*path, index)
                lines[place] = child.start_mark.line + 1
                items.append(build(child, place))
            return items
        if isinstance(node, yaml.MappingNode):
            mapping: dict[Any, Any] = {}
            for key_node, child in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(None, None, "a key must be a word or a number", key_node.start_mark)
                key = loader.construct_object(key_node)
                if numbers and isinstance(key, str) and _NUMBER.fullmatch(key):
                    key = int(key)
                if key in mapping:
                    problem = f"key {key!r} is written twice; remove one"
                    raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
                place = (*path, key)
                lines[place] = key_node.start_mark.line + 1
                mapping[key] = build(child, place)
            return mapping
        return loader.construct_object(node)

    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return (None if node is None else build(node, ())), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{file}, line {line}: {_one_line(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{file}, line {line}: the character {chr(error.character)!a} is not allowed") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested too deeply for a recipe") from None
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None


def _one_line(error: Any) -> str:
    """PyYAML's words, such as "mapping values are not allowed here"."""
    text = error.problem or error.context or "not valid YAML"
    if text.startswith("but ") and error.context:
        text = f"{error.context}, {text}"
    return " ".join(text.split())
