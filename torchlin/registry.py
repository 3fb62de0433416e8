"""Names at the boundary: a user's string or mapping becomes an object once, by look-up in a tuple of classes."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch


class Named(Protocol):
    name: ClassVar[str]
    also_called: ClassVar[tuple[str, ...]]


T = TypeVar("T", bound=Named)


def nearest(word: str, known: Iterable[str]) -> str:
    """A ready " (did you mean ...?)" for an error message, or "" where nothing known is close to `word`."""
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


@dataclass(frozen=True)
class Registry(Generic[T]):
    """A tuple of classes that users may name. `kind` is the word for one in messages, `base` what all extend."""

    kind: str
    base: type[T]
    classes: tuple[type[T], ...]

    def names(self) -> list[str]:
        return [cls.name for cls in self.classes]

    def find(self, name: str) -> type[T]:
        """The class called `name`, or an imported one of a user by its path ("package.module.Class").

        Raises:
            ValueError: no such class; the message suggests the nearest name, other libraries' words included.
        """
        for cls in self.classes:
            if cls.name == name:
                return cls
        if "." in name:
            return self._imported(name)
        aliases = {alias: cls.name for cls in self.classes for alias in cls.also_called}
        alias = aliases.get(name.lower())
        hint = f" (did you mean {alias!r}?)" if alias else nearest(name, self.names())
        raise ValueError(f"unknown {self.kind} {name!r}{hint}; known: {', '.join(self.names())}")

    def _imported(self, path: str) -> type[T]:
        # Looked up, never imported: the name may come from a file that somebody else wrote.
        module, _, attribute = path.rpartition(".")
        if module not in sys.modules:
            raise ValueError(f"{self.kind} {path!r}: import the module {module!r} that defines it first")
        cls = getattr(sys.modules[module], attribute, None)
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{self.kind} {path!r} is not a subclass of torchlin's {self.base.__name__}")
        return cls

    def make(self, spec: str | Mapping[str, Any] | T) -> T:
        """An object from a name ("hinge"), a mapping ({"name": "hinge", "margin": 1.0}) or the object itself.

        Raises:
            ValueError: unknown name, unknown or missing option, no "name" in the mapping.
            TypeError: none of the three.
        """
        if isinstance(spec, self.base):
            return spec
        options = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(options, Mapping):
            raise TypeError(
                f"{self.kind} is a name, a mapping or a {self.base.__name__}, got {type(spec).__name__}; "
                f"known names: {', '.join(self.names())}"
            )
        options = dict(options)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f'{self.kind} {spec!r} has no "name"; known: {", ".join(self.names())}')
        cls = self.find(name)
        parameters = parameters_of(cls)
        for option in options:
            if option not in parameters:
                raise ValueError(
                    f"{self.kind} {name!r} has no option {option!r}{nearest(option, list(parameters))}; "
                    f"options: {', '.join(parameters) or 'none'}"
                )
        missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
        if missing:
            example = ", ".join(f"{m}: 0.001" for m in missing)
            raise ValueError(f"{self.kind} {name!r} needs {' and '.join(missing)}, as in {{name: {name}, {example}}}")
        return cls(**options)

    def spec(self, thing: T) -> dict[str, Any]:
        """The mapping that `make` turns back into `thing`: strings, numbers and lists only.

        Raises:
            ValueError: a class inside a function or class, or one that does not keep its arguments.
        """
        cls = type(thing)
        name = cls.name
        if cls not in self.classes:
            name = f"{cls.__module__}.{cls.__qualname__}"
            if "." in cls.__qualname__:
                raise ValueError(f"{self.kind} {name} cannot be found again by its name: define it at module level")
        return {"name": name, **options_of(thing)}


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters by name; where it passes **kwargs on, those of the class it extends as well."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]  # without self
        kinds = {p.kind for p in own}
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found |= {p.name: p for p in own if p.kind not in variable and p.name not in found}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def options_of(thing: object) -> dict[str, Any]:
    """The constructor's arguments that are not at their defaults, read from the attributes of the same names.

    Tensors become lists, so that the result is plain values.

    Raises:
        ValueError: an argument is kept under no attribute of its name.
    """
    options = {}
    for name, parameter in parameters_of(type(thing)).items():
        if not hasattr(thing, name):
            raise ValueError(f"{type(thing).__name__} does not keep its argument {name!r}: set self.{name} in __init__")
        value = getattr(thing, name)
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        if value != parameter.default:
            options[name] = value
    return options
