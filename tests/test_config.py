from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cdvideo.config import check, load_config, to_yaml
from cdvideo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Semantic:
    weight: float = 1.0
    variant: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        check((self.weight >= 0, f"weight={self.weight}: must be at least 0"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    steps: int
    batch: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    steps: int = 400
    save_every: int = 100
    lr: float = 1e-4
    token: str = "sks"
    note: str | None = None
    images: Path | None = None
    flip: bool = True
    sizes: tuple[int, ...] = (64, 128)
    window: tuple[int, float] = (16, 0.5)
    semantic: Semantic = Semantic()
    prior: Semantic | None = None
    loop: Loop = field(default_factory=lambda: Loop(steps=7, batch=3))

    def __post_init__(self) -> None:
        check(
            (self.steps >= 1, f"steps={self.steps}: must be at least 1"),
            (self.save_every <= self.steps, f"save_every={self.save_every}: must be at most steps={self.steps}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Required:
    class_word: str
    steps: int = 1

    def __post_init__(self) -> None:
        check((self.steps >= 1, f"steps={self.steps}: must be at least 1"))


def yaml_file(folder: Path, text: str) -> Path:
    file = folder / "example.yaml"
    file.write_text(text)
    return file


def faults(*overrides: str, file: Path | None = None) -> list[str]:
    """The lines that tell the faults of these settings."""
    with pytest.raises(UserError) as raised:
        load_config(Example, file=file, overrides=overrides)
    return [line.strip() for line in raised.value.given.splitlines()[1:]]


def test_defaults() -> None:
    assert load_config(Example) == Example()


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "steps: 300\nsave_every: 50\nsemantic:\n  weight: 2\n  variant: released\n")
    config = load_config(Example, file=file, overrides=["steps=200", "semantic.weight=0.5", "steps=150"])
    assert config == Example(steps=150, save_every=50, semantic=Semantic(weight=0.5, variant="released"))
    assert type(load_config(Example, file=file).semantic.weight) is float


def test_overrides_are_read_as_their_field_has_it() -> None:
    config = load_config(
        Example,
        overrides=[
            "lr=1e-3",
            "token=no",
            "note=a=b: c, d",
            "images=~/photos",
            "flip=false",
            "sizes=[96]",
            "window=[8, 1]",
            "prior.weight=3",
        ],
    )
    assert (config.lr, config.token, config.note, config.flip) == (1e-3, "no", "a=b: c, d", False)
    assert config.images == Path.home() / "photos"
    assert (config.sizes, config.window) == ((96,), (8, 1.0))
    assert config.prior == Semantic(weight=3)


def test_a_group_lies_over_the_default_of_its_field(tmp_path: Path) -> None:
    assert load_config(Example, overrides=["loop.steps=9"]).loop == Loop(steps=9, batch=3)
    assert load_config(Example, file=yaml_file(tmp_path, "loop: {batch: 2}\n")).loop == Loop(steps=7, batch=2)


def test_null_is_none_only_where_the_field_may_be_empty(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "note: text\n")
    assert load_config(Example, file=file, overrides=["note=null"]).note is None
    assert load_config(Example, overrides=["token=null"]).token == "null"
    assert faults("steps=null") == ["steps=None: must be a whole number"]


def test_yaml_reads_1e4_as_text_and_configs_read_it_as_a_number(tmp_path: Path) -> None:
    assert load_config(Example, file=yaml_file(tmp_path, "lr: 2e-4\n")).lr == 2e-4


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("steps=ten", "steps='ten': must be a whole number"),
        ("steps=2.0", "steps=2.0: must be a whole number"),
        ("steps=true", "steps=True: must be a whole number"),
        ("lr=.nan", "lr=nan: must be a number"),
        ("lr=fast", "lr='fast': must be a number"),
        ("lr=true", "lr=True: must be a number"),
        ("flip=1", "flip=1: must be true or false"),
        ("images=", "images='': must be a path"),
        ("sizes=64", "sizes=64: must be a list [...] of any number of: a whole number"),
        ("sizes=[64, x]", "sizes[1]='x': must be a whole number"),
        ("sizes=[64", "sizes=[64: can not be read; lists are written [a, b]"),
        ("window=[1]", "window=[1]: must be a list [...] of 2 of: a whole number"),
        ("semantic.variant=paper2", "semantic.variant='paper2': must be one of paper, released"),
        ("semantic=1", "semantic=1: must be a group of settings (weight, variant)"),
        ("steps.more=1", "steps={'more': '1'}: must be a whole number"),
        ("steps", "'steps': an override is written key=value"),
        ("=3", "'=3': an override is written key=value"),
        (".steps=3", "'.steps=3': an override is written key=value"),
    ],
)
def test_wrong_values(override: str, fault: str) -> None:
    assert faults(override) == [fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("token: 5\n", "token=5: must be text, in quotes"),
        ("token: no\n", "token=False: must be text, in quotes"),
        ("semantic: 3\n", "semantic=3: must be a group of settings (weight, variant)"),
        ("sizes: {a: 1}\n", "sizes={'a': 1}: must be a list [...] of any number of: a whole number"),
        ("1: 2\n", "1: no such setting; there are"),
    ],
)
def test_wrong_values_in_a_file(tmp_path: Path, text: str, fault: str) -> None:
    (line,) = faults(file=yaml_file(tmp_path, text))
    assert line.startswith(fault)


def test_unknown_keys_suggest_what_was_meant() -> None:
    assert faults("step=5") == ["step: no such setting, did you mean steps?"]
    assert faults("semantic.wieght=5") == ["semantic.wieght: no such setting, did you mean semantic.weight?"]
    assert faults("variant=paper") == ["variant: no such setting, did you mean semantic.variant or prior.variant?"]
    (line,) = faults("qqq=1")
    assert line.startswith("qqq: no such setting; there are steps, save_every, lr, ")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "stesp: 3\nlr: fast\nsemantic: {weight: -1, variant: other}\nsave_every: 500\n")
    assert faults("sizes=7", "nonsense", file=file) == [
        "'nonsense': an override is written key=value",
        "stesp: no such setting, did you mean steps?",
        "lr='fast': must be a number",
        "semantic.variant='other': must be one of paper, released",
        "semantic.weight=-1.0: must be at least 0",
        "sizes=7: must be a list [...] of any number of: a whole number",
        "save_every=500: must be at most steps=400",
    ]


def test_error_names_the_file_and_where_the_settings_are_documented(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "stesp: 3\n")
    with pytest.raises(UserError) as raised:
        load_config(Example, file=file)
    assert raised.value.given.startswith("1 fault in the settings:")
    assert "Example" in raised.value.allowed
    assert str(file) in raised.value.do


def test_a_rule_may_be_broken_in_python_too() -> None:
    with pytest.raises(ValueError, match="steps=0: must be at least 1\nsave_every=100: must be at most steps=0"):
        Example(steps=0)


def test_fields_without_a_default_must_be_given() -> None:
    assert load_config(Required, overrides=["class_word=dog"]).class_word == "dog"
    with pytest.raises(UserError, match="class_word: has no default and must be given"):
        load_config(Required)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("steps: [1\n", "line 2"),
        ("steps: 1\nsteps: 2\n", "'steps' stands twice"),
        ("semantic:\n  weight: 1\n  weight: 2\n", "'weight' stands twice"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match="example.yaml") as raised:
        load_config(Example, file=yaml_file(tmp_path, text))
    assert message in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        load_config(Example, file=tmp_path / "nowhere.yaml")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(Example, file=yaml_file(tmp_path, "# nothing yet\n")) == Example()


def test_to_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = Example(
        lr=2e-7,
        token="no",
        note="1e3",
        images=Path("photos/März"),
        sizes=(),
        semantic=Semantic(variant="released"),
        prior=Semantic(weight=0.25),
    )
    assert load_config(Example, file=yaml_file(tmp_path, to_yaml(config))) == config
    assert load_config(Example, file=yaml_file(tmp_path, to_yaml(Example()))) == Example()


BOMBS = {
    "aliases": "a: &a [x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefg", "bcdefgh", strict=True)),
    "one alias": "steps: &n 5\nseed: *n\n",
    "brackets": "steps: " + "[" * 5000,
    "digits": "steps: " + "9" * 10_000,
    "a date": "steps: 2001-99-99",
    "a long text": "steps: " + "x" * 100_000,
    "a long key": "y" * 100_000 + ": 1",
    "a large file": "# " + "z" * 2_000_000,
    "many keys": "".join(f"k{n}: 1\n" for n in range(3000)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_hostile_yaml_is_told_shortly(tmp_path: Path, kind: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Small:
        steps: int = 1
        seed: int = 0

    file = tmp_path / "a.yaml"
    file.write_text(BOMBS[kind])
    with pytest.raises(UserError) as caught:
        load_config(Small, file=file)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 10_000, "2001-99-99", "&a [*a]"])
def test_hostile_overrides_are_told_shortly(value: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Small:
        steps: int = 1
        rate: float = 1.0

    for name in ("steps", "rate"):
        with pytest.raises(UserError) as caught:
            load_config(Small, overrides=[f"{name}={value}"])
        assert len(str(caught.value)) < 3000
