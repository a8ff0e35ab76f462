"""YAML with one meaning: a key that a mapping has twice is refused, as in JSON. PyYAML keeps the last value."""

from __future__ import annotations

from typing import Any

import yaml


class NotYaml(Exception):
    """A text is not YAML, or has a value that cannot be made. The message says why."""


class _StrictLoader(yaml.SafeLoader):
    """`SafeLoader` that takes each key of a mapping once. What `<<` merges may still be overridden, as YAML says."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping.

        Raises:
            yaml.constructor.ConstructorError: A key is there twice; its place is in the message.
        """
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def load_yaml(text: str) -> Any:
    """Parse a text that is one YAML document of plain values.

    Raises:
        NotYaml: It is no YAML, has a key twice or a date that does not exist, or is nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise NotYaml("it is nested too deeply") from None
    # PyYAML passes on whatever Python's own types raise: 2024-13-45 is a ValueError.
    except Exception as error:
        raise NotYaml(str(error) or type(error).__name__) from error
