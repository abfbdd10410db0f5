"""Frozen dataclasses as JSON, and back with every field checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from typing import Any, Literal, TypeVar

VERSION = 1
"""Of the form. It rises when a field changes its meaning; a new field with a default needs no new version."""

T = TypeVar("T")


def write(value: Any, kind: str) -> str:
    """A dataclass of numbers, text, tuples and further dataclasses as JSON that says what it is."""
    return json.dumps({"lighterage": kind, "version": VERSION, **dataclasses.asdict(value)}, indent=1)


def read(cls: type[T], kind: str, text: str) -> T:
    """What `write` wrote of a `cls`.

    Raises:
        ValueError: the text is no JSON, of another kind or version, or a field is missing, unknown or of another type.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ValueError(f"this is no {kind} of lighterage but damaged or no JSON: {error}.") from error
    if not isinstance(data, dict) or "lighterage" not in data:
        raise ValueError(f'this is no {kind} of lighterage: it is JSON without `"lighterage": "{kind}"`.')
    found, version = data.pop("lighterage"), data.pop("version", None)
    if found != kind:
        raise ValueError(f"a {kind} was asked for, and this is a {found} of lighterage.")
    if version != VERSION:
        raise ValueError(
            f"this {kind} has version {version!r}, and this lighterage reads version {VERSION}. "
            "Read it with the lighterage that wrote it, or measure again."
        )
    result: T = _dataclass(cls, data, kind)
    return result


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (hints[field.name], _has_default(field)) for field in dataclasses.fields(cls)}


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _dataclass(cls: Any, data: Any, where: str) -> Any:
    fields = _fields(cls)
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {cls.__name__} with named fields; got {_shown(data)}.")
    unknown = sorted(data.keys() - fields.keys())
    missing = [name for name, (_, optional) in fields.items() if not optional and name not in data]
    if unknown or missing:
        faults = [f"has no field {name!r}" for name in unknown] + [f"lacks its field {name!r}" for name in missing]
        raise ValueError(
            f"{where}: a {cls.__name__} {' and '.join(faults)}. The file is damaged or of another version."
        )
    return cls(**{name: _value(fields[name][0], value, f"{where}.{name}") for name, value in data.items()})


def _value(hint: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, data, where)
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError:
            raise ValueError(f"{where} is a number of at most 1.8e308; got {_shown(data)}.") from None
    if hint in (int, str, bool) and type(data) is hint:
        return data
    origin = typing.get_origin(hint)
    if origin is Literal and data in typing.get_args(hint):
        return data
    if origin is types.UnionType or origin is typing.Union:
        options = typing.get_args(hint)
        if data is None and type(None) in options:
            return None
        return _value(next(option for option in options if option is not type(None)), data, where)
    if origin is tuple and isinstance(data, list):
        item = typing.get_args(hint)[0]
        return tuple(_value(item, each, f"{where}[{index}]") for index, each in enumerate(data))
    if origin is typing.Literal:
        words = ", ".join(json.dumps(word) for word in typing.get_args(hint))
        raise ValueError(f"{where} is one of {words}; got {_shown(data)}.")
    raise ValueError(f"{where} is {getattr(hint, '__name__', None) or hint}; got {_shown(data)}.")


def _shown(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 60 else text[:57] + "..."
