"""A file says what its dataclass can say, in its types; anything else is one sentence that names the place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qwen_fused.common.typed_yaml import check_types, from_plain, nearest, read_mapping, to_plain


@dataclass(frozen=True)
class Inner:
    scale: float = 1.0
    name: str = "a"


@dataclass(frozen=True)
class Outer:
    count: int = 1
    rate: float = 0.5
    fast: bool = False
    limit: int | None = None
    minutes: float | None = None
    mode: Literal["one", "two"] = "one"
    folder: Path = Path("runs")
    other: Path | None = None
    inner: Inner = field(default_factory=Inner)


def read(tmp_path: Path, text: str) -> dict:
    (tmp_path / "c.yaml").write_text(text)
    return read_mapping(tmp_path / "c.yaml")


finite = st.floats(allow_nan=False, allow_infinity=False)
word = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8)


@given(
    st.builds(
        Outer, st.integers(), finite, st.booleans(), st.none() | st.integers(), st.none() | finite,
        st.sampled_from(["one", "two"]), word.map(Path), st.none() | word.map(Path), st.builds(Inner, finite, word),
    )
)  # fmt: skip
def test_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(yaml.safe_dump(to_plain(value)), "utf-8")
    assert from_plain(Outer, read_mapping(path)) == value


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "+5e-5", ".5e-4", "0.00005", "5.0e-05"])
def test_numbers_as_people_write_them(tmp_path, text):
    assert from_plain(Outer, read(tmp_path, f"rate: {text}")).rate == pytest.approx(5e-5)


def test_whole_number_where_a_number_is_due(tmp_path):
    rate = from_plain(Outer, read(tmp_path, "rate: 2")).rate
    assert rate == 2 and isinstance(rate, float)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("count: x", "count must be a whole number, got 'x'"),
        ("count: 1.5", "count must be a whole number, got 1.5"),
        ("count: true", "count must be a whole number, got True"),
        ("rate: high", "rate must be a finite number, got 'high'"),
        ("rate: .nan", "rate must be a finite number, got nan"),
        ("rate: 1e999", "rate must be a finite number, got inf"),
        ("rate:", "rate must be a finite number, got None"),
        ("fast: 1", "fast must be true or false, got 1"),
        ("limit: no limit", "limit must be a whole number or null, got 'no limit'"),
        ("mode: three", "mode must be one of one, two, got 'three'"),
        ("mode: [one]", "mode must be one of one, two, got ['one']"),
        ("folder: 3", "folder must be a path, got 3"),
        ("inner: 3", "inner must be keys and values, got 3"),
        ("inner: {scale: big}", "inner.scale must be a finite number, got 'big'"),
        ("inner: {scael: 1}", "inner.scael is not a key of the configuration; did you mean inner.scale?"),
        ("conut: 3", "conut is not a key of the configuration; did you mean count?"),
        ("zzz: 3", "zzz is not a key of the configuration"),
        ("3: 3", "3 is not a key of the configuration"),
    ],
)
def test_one_sentence_names_the_key(tmp_path, text, sentence):
    with pytest.raises(ValueError) as error:
        from_plain(Outer, read(tmp_path, text))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: [", "line 1 is not YAML"),
        ("a: 1\nb: 'x\n", "line 3 is not YAML"),
        ("[1, 2]", "must hold keys and values, got a list"),
        ("just words", "must hold keys and values, got a str"),
        ("count: 1\ncount: 2", "line 1 is not YAML: the key 'count' is there twice"),
        ("a: !!python/object/apply:os.getcwd []", "line 1 is not YAML: could not determine a constructor"),
        ("[" * 5000, "is not YAML"),
        ("{[1]: 2}", "is not YAML"),
    ],
)
def test_what_is_no_mapping_is_named(tmp_path, text, sentence):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert sentence in str(error.value) and "c.yaml" in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="c.yaml is not YAML"):
        read_mapping(tmp_path / "c.yaml")


def test_empty_file_says_nothing(tmp_path):
    assert read(tmp_path, "# nothing yet\n") == {}


def test_check_types_of_what_was_built_in_python():
    check_types(Outer(rate=1))
    with pytest.raises(ValueError, match="^folder must be a path, got 'runs'$"):
        check_types(Outer(folder="runs"))


def test_nearest():
    assert nearest("batchsize", ["batch_size", "seed"]) == "; did you mean batch_size?"
    assert nearest("qqq", ["batch_size", "seed"]) == ""
