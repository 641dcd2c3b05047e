"""Typed, strict configs. Imports no torch, so that a typo is told in a blink.

A config is a frozen dataclass. Its defaults, its documentation and its rules stand in one place, the class:

    @dataclass(frozen=True, kw_only=True, slots=True)
    class ConceptConfig:
        steps: int = 400
        '''Optimizer steps.'''
        semantic: SemanticConfig = SemanticConfig()
        '''The semantic preservation loss.'''

        def __post_init__(self) -> None:
            check(
                (self.steps >= 1, f"steps={self.steps}: must be at least 1"),
                ...
            )

`load_config` fills it from three sources, each over the one before: the defaults, a YAML file, and overrides from the
command line (`steps=200 semantic.weight=0.5`). Whatever is wrong in any of them is collected and told in one error.

Fields may be bool, int, float, str, Path, Literal, tuple, another config, or one of these or None.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cdvideo.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
LARGEST = 100_000  # bytes of a config file; ours have 3 kB, and YAML takes a second for this
LONGEST_TEXT = 20_000  # characters of a prompt, key frames and all; a text encoder reads 75 tokens
DEEPEST = 50  # lists and mappings in each other
MOST_FAULTS = 50  # that are told of one group of settings


def check(*rules: tuple[bool, str]) -> None:
    """Holds the rules of a config, for use in its `__post_init__`.

    Args:
        rules: Pairs (holds, message); a message begins with the field, as `steps=0: must be at least 1`.

    Raises:
        ValueError: With one line for every rule that does not hold.
    """
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def load_config(cls: type[T], *, file: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds a config from its defaults, a YAML file over them, and `key=value` overrides over both.

    Args:
        cls: The config's dataclass; dataclasses may be nested.
        file: A YAML file whose keys are the names of fields.
        overrides: Texts as `steps=200` or `semantic.weight=0.5`; lists as `sizes=[1, 2]`; `null` is None.

    Raises:
        UserError: Naming the unknown keys, wrong types and broken rules that there are, not only the first.
    """
    tree = {} if file is None else _read_yaml(file)
    problems: list[str] = []
    for override in overrides:
        problems += _lay_over(tree, override)
    try:
        config = _build(cls, tree, _defaults(cls))
    except ValueError as error:
        problems += _lines(error)
    if problems:
        raise UserError(
            f"{len(problems)} fault{'s' * (len(problems) > 1)} in the settings:"
            + "".join(f"\n    {problem}" for problem in problems),
            allowed=f"the fields of {cls.__qualname__}, with their ranges, in {cls.__module__.replace('.', '/')}.py",
            do=f"correct {f'{file} or ' if file else ''}the key=value settings on the command line",
        )
    return config


def config_from(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Builds a config from plain values over its defaults, as strictly as `load_config`.

    Raises:
        ValueError: With one line for each fault.
    """
    return _build(cls, tree, _defaults(cls))


def as_path(text: str) -> Path:
    """A path as people write it, ~ included; whether anything is there does not matter.

    Raises:
        UserError: For a text that no path can be, or one that leads where this user may not look.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero in it, a home that nobody knows
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{_SHORT.repr(text)} can not be used as a path ({reason})",
            allowed="a path that this system takes, in folders that you may read",
            do="correct the path",
        ) from error
    return path


def check_text(text: str) -> None:
    """Raises UserError for a text that no prompt can be: of a length that no model reads, or with bytes that are no
    Unicode, as a terminal gives them that writes in another encoding."""
    surrogates = [character for character in text if "\ud800" <= character <= "\udfff"]
    if surrogates or len(text) > LONGEST_TEXT:
        raise UserError(
            f"{_SHORT.repr(text)}: a text of {len(text)} characters"
            + (f", of which {len(surrogates)} are none of Unicode" if surrogates else ""),
            allowed=f"text in UTF-8, of at most {LONGEST_TEXT} characters",
            do="let the terminal write UTF-8" if surrogates else "shorten it",
        )


def text_rules(name: str, text: str) -> Iterator[tuple[bool, str]]:
    """For `check`: the text can be a prompt."""
    try:
        check_text(text)
    except UserError as error:
        yield False, f"{name}={error.given}"


def to_yaml(config: DataclassInstance) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=120)


class _Text(str):
    """A value from the command line: not parsed yet, since only the field's type says how."""

    __slots__ = ()


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that is written twice, and aliases, by which a few lines may stand
    for millions of values. It tells where a value stands that is not of the kind that its tag (!!int) says."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read: write the value out", mark)
        if self._depth >= DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"values nested more than {DEEPEST} times", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:  # of what is impossible
            what = f"not of the kind {node.tag.rpartition(':')[2]!r} ({error})"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # else refused below
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {_SHORT.repr(key.value)} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _short() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxlist = short.maxdict = short.maxtuple = 20
    short.maxlong = 60
    return short


_SHORT = _short()  # for what a file may hold without end


def _read_yaml(file: Path) -> dict[str, Any]:
    allowed = f"a YAML file of `key: value` lines, of at most {LARGEST // 1000} kB"
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"config {file} is too large", allowed=allowed, do="check the path of --config")
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"config {file}: {error.strerror}", allowed=allowed, do="check the path of --config") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, numbers and dates that are none
        raise UserError(f"config {file}: {error}", allowed=allowed, do="correct the file at that place") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {file} holds a {type(tree).__name__}", allowed=allowed, do="write `key: value` lines")
    return tree


def _lay_over(tree: dict[str, Any], override: str) -> list[str]:
    """Writes one `a.b=value` into the tree; returns what is wrong with it."""
    key, equals, value = override.partition("=")
    *groups, leaf = key.strip().split(".")
    if not equals or not all([*groups, leaf]):
        return [f"{override!r}: an override is written key=value"]
    for group in groups:
        if tree.get(group) is None:
            tree[group] = {}
        tree = tree[group]
        if not isinstance(tree, dict):
            return [f"{override!r}: {group} holds no further keys"]
    tree[leaf] = _Text(value)
    return []


def _build(cls: type[T], tree: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> T:
    """Builds the dataclass from a tree of plain values over defaults. Raises ValueError with one line per fault."""
    kinds = get_type_hints(cls)
    problems: list[str] = []
    values = dict(defaults)
    for key, value in tree.items():
        if len(problems) >= MOST_FAULTS:
            problems.append(f"{prefix}...: more of the kind")
            break
        if key not in kinds:
            meant = _did_you_mean(str(key)[:200], [*setting_names(cls)], prefix)
            problems.append(f"{prefix}{str(key)[:200]}: no such setting{meant}")
            continue
        try:
            values[key] = _convert(value, kinds[key], f"{prefix}{key}", defaults.get(key))
        except ValueError as error:
            problems += str(error).splitlines()

    names = [field.name for field in dataclasses.fields(cls)]
    problems += [
        f"{prefix}{name}: has no default and must be given" for name in names if name not in {**tree, **values}
    ]
    if all(name in values for name in names):
        try:
            # Faulty settings have their defaults here, so that the rules which the others break are told with them.
            config = cls(**values)
        except ValueError as error:
            problems += [prefix + line for line in _lines(error)]
    if problems:
        raise ValueError("\n".join(problems))
    return config


def _lines(error: ValueError) -> list[str]:
    return [f"{error.given} (allowed: {error.allowed})"] if isinstance(error, UserError) else str(error).splitlines()


def _convert(value: Any, kind: Any, name: str, default: Any = None) -> Any:
    """Turns a value from YAML or the command line into one of the field's type, strictly. Raises ValueError.

    A group of settings lies over `default`, so that `semantic.weight=2` changes nothing else in `semantic`.
    """
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if types.NoneType in options and (value is None or (isinstance(value, _Text) and value == "null")):
            return None
        *others, last = [option for option in options if option is not types.NoneType]
        for other in others:  # `float | str`: the first that it can be
            with contextlib.suppress(ValueError):
                return _convert(value, other, name, default)
        return _convert(value, last, name, default)
    if origin is Literal:
        for option in options:
            if value == (str(option) if isinstance(value, _Text) else option):
                return option
    elif isinstance(value, _Text) and kind not in (str, Path):
        return _convert(_parse(value, name), kind, name, default)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(kind, value, _defaults(kind) if default is None else _shallow(default), f"{name}.")
    elif origin is tuple and isinstance(value, list):
        inners = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(inners) == len(value):
            return _convert_all(value, inners, name)
    elif kind is Path and isinstance(value, str) and value:
        try:
            return as_path(value)
        except UserError as error:
            raise ValueError(f"{name}: {error.given}") from error
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _finite(value, name)  # text too: YAML takes 1e-4 for text, and 1.0e-4 for a number
    elif kind is str and isinstance(value, str):
        return str(value)
    elif kind in (bool, int) and type(value) is kind:
        return value
    raise ValueError(f"{name}={_SHORT.repr(value)}: must be {_describe(kind)}")


def _convert_all(values: Sequence[Any], kinds: Sequence[Any], name: str) -> tuple[Any, ...]:
    return tuple(
        _convert(value, kind, f"{name}[{i}]") for i, (value, kind) in enumerate(zip(values, kinds, strict=True))
    )


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}={text[:200]}: can not be read; lists are written [a, b]") from error


def _finite(value: float | str, name: str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):  # of a whole number that is too large for a float
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={_SHORT.repr(value)}: must be {_describe(float)}")
    return number


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text, in quotes", Path: "a path"}


def _describe(kind: Any) -> str:
    """A type in words: `a whole number`, `one of ddim, dpm++`, ..."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(str(option) for option in options)}"
    if origin is tuple:
        count = "any number" if options[-1] is Ellipsis else str(len(options))
        return f"a list [...] of {count} of: {_describe(options[0])}"
    if dataclasses.is_dataclass(kind):
        return f"a group of settings ({', '.join(field.name for field in dataclasses.fields(kind))})"
    return _WORDS[kind]


def _did_you_mean(key: str, names: Sequence[str], prefix: str) -> str:
    """The settings that the unknown key may have meant: those that stand in a group, or look alike."""
    alike = [name for name in names if name.rpartition(".")[2] == key] or difflib.get_close_matches(key, names, n=1)
    if alike:
        return f", did you mean {' or '.join(prefix + name for name in alike)}?"
    return f"; there are {', '.join(prefix + name for name in names)}"


def setting_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        groups = [k for k in (kinds[field.name], *get_args(kinds[field.name])) if dataclasses.is_dataclass(k)]
        if groups:
            yield from setting_names(groups[0], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _defaults(cls: Any) -> dict[str, Any]:
    """The defaults of those fields that have one."""
    fields = dataclasses.fields(cls)
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return made | {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _shallow(config: DataclassInstance) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
