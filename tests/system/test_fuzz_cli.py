"""Flags and YAML, right and wrong, by the hundred: what is wrong is refused in a sentence with code 2, never taken.

Together with test_fuzz_files.py and test_fuzz_ops.py these are a thousand cases and more.
"""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fused.cli import main as cli
from qwen_fused.config import LARGEST, TrainConfig

CORPUS = Path(__file__).with_name("corpus")
HINTS = {name: hint for name, hint in typing.get_type_hints(TrainConfig).items() if name != "weights"}
# read from the docstrings of TrainConfig and not from its code
ABOVE_0 = """batch_size epochs max_batches max_minutes start_minutes max_prompt_tokens prompt_window prompt_visits
    prompt_dim agent_channels plan_steps policy_hidden delta_scale qwen_lr agent_lr policy_lr clip log_every
    checkpoint_every keep_checkpoints max_eval_tasks"""
AT_LEAST_0 = "seed split_seed lora_rank warmup_batches eval_every weight_decay reversibility start_tasks ttt_seconds"
SHARES = "augment hard_floor objective_share size_warmup size_weight final_lr early_step_weight"
RULES = {
    **dict.fromkeys(ABOVE_0.split(), lambda x: x > 0),
    **dict.fromkeys(AT_LEAST_0.split(), lambda x: x >= 0),
    **dict.fromkeys(SHARES.split(), lambda x: 0 <= x <= 1),
    "val_fraction": lambda x: 0 <= x < 1,
    # what torch and numpy can be seeded with
    "seed": lambda x: 0 <= x < 2**63,
    "split_seed": lambda x: 0 <= x < 2**63,
}
ODD = st.sampled_from(
    ["0", "-1", "1", "3", "0.5", "1.5", "1e-4", "1e3", "-0.0", "inf", "-inf", "nan", "1e999", "99999999999999999999",
     "", " ", "true", "None", "none", "null", "auto", "tiny", "cpu", "fp16", "sdpa", "cell", "é", "x" * 3000, "a/b",
     "[1]", "{}", "1,2", "0x10", "--seed", "0b1", "1_000", "½", "\n", "$(id)", "%s"]
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


def call(*words: str) -> tuple[int, str, str]:
    """A command line's exit code, stdout and stderr; anything but a code is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(words))
        except SystemExit as stopped:
            code = stopped.code
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


def options(hint: Any) -> tuple:
    return typing.get_args(hint) if not isinstance(hint, type) else (hint,)


def meant(name: str, text: str) -> Any:
    """What a flag's text means, or ValueError where it means nothing; apart from the parser under test."""
    hint = HINTS[name]
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise ValueError
        return text
    kinds = options(hint)
    if type(None) in kinds and text == "None":
        return None
    if str in kinds or Path in kinds:
        return str(Path(text)) if Path in kinds else text
    value = int(text) if int in kinds else float(text)
    if not math.isfinite(value) or not RULES.get(name, lambda x: True)(value) or value > LARGEST.get(name, math.inf):
        raise ValueError
    return value


# a run to resume is another matter, and what goes with attention depends on two others
APART = ("resume", "qwen_dtype", "precision", "attention")
VALUED = sorted(name for name, hint in HINTS.items() if hint is not bool and name not in APART)
FLAG = st.sampled_from(VALUED).flatmap(lambda name: st.tuples(st.just(name), ODD | TEXT))


@settings(deadline=None, max_examples=400)
@given(st.lists(FLAG, min_size=1, max_size=3, unique_by=lambda flag: flag[0]))
def test_flags_mean_what_they_say_or_are_refused(flags):
    wanted, wrong = {}, False
    for name, text in flags:
        try:
            wanted[name] = meant(name, text)
        except ValueError:
            wrong = True
    # --name=text: a text that starts with a dash is no flag
    code, out, err = call("train", "--print-config", *(f"--{name.replace('_', '-')}={text}" for name, text in flags))
    if code == 0:
        assert not wrong, flags
        printed = yaml.safe_load(out)
        assert {name: printed[name] for name in wanted} == wanted
    else:
        assert code == 2 and err.strip(), (flags, err)
        assert wrong, (flags, err)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*HINTS, "weights", "bach_size", "Seed", "seed ", "__class__"]) | TEXT


def kinds_of(name: str) -> tuple:
    kinds = options(HINTS[name])
    return (*kinds, int) if float in kinds else (str if kind is Path else kind for kind in kinds)


@settings(deadline=None, max_examples=250)
@given(st.dictionaries(KEYS, PLAIN, max_size=3))
def test_yaml_is_checked_key_by_key(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        config = TrainConfig.load(path)
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
        return
    for name, value in content.items():
        assert name in HINTS or name == "weights"
        if name == "weights":
            assert isinstance(value, dict)
        elif typing.get_origin(HINTS[name]) is typing.Literal:
            assert value in typing.get_args(HINTS[name])
        else:
            kinds = tuple(kinds_of(name))
            assert type(value) in kinds, (name, value)
            assert value is None or RULES.get(name, lambda x: True)(value)
            assert type(value) is not float or math.isfinite(value)
            read = getattr(config, name)
            assert read == value or (isinstance(read, Path) and read == Path(value))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_bytes_for_a_config_are_refused_in_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    code, _, err = call("train", "--print-config", "--config", str(path))
    # no key of ours comes out of so few random bytes: nothing but an empty document is taken
    if code == 0:
        assert yaml.safe_load(content.decode()) in (None, {})
    else:
        assert code == 2 and str(path) in err.replace("\n", "")


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system [touch exploded]", "seed: !!python/name:os.system", "seed: 1\nseed: 2", "- 1",
     "7", "a: &a [*a]", "seed: .nan", "&a" * 50, "seed: 1e5", "? [1]: 2", "{" * 2000],
)  # fmt: skip
def test_yaml_that_is_no_configuration(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    code, _, err = call("train", "--print-config", "--config", "c.yaml")
    assert code == 2 and "c.yaml" in err
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


CASES = [line for line in (CORPUS / "flags.txt").read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("line", CASES)
def test_corpus_of_command_lines(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    words, named = line.rsplit(" :: ", 1)
    code, out, err = call(*shlex.split(words))
    assert code == 2, (code, out, err)
    assert named.lower() in err.lower(), err
    assert not list(tmp_path.glob("*/*")), "nothing is left of a run that never was"


def test_help_says_the_exit_codes():
    code, out, _ = call("--help")
    assert code == 0
    for number in ("0", "1", "2", "129", "130", "143"):
        assert f" {number} " in out


WRITING: list[str] | None = None


def note_writes(event: str, arguments: tuple) -> None:
    """An audit hook, which stays for good: notes what is opened for writing, made, moved or removed while asked to."""
    if WRITING is None:
        return
    if event == "open":
        path, mode, bits = arguments
        writes = isinstance(mode, str) and set(mode) & set("wax+") or isinstance(bits, int) and bits & 0o3
        if writes and isinstance(path, (str, bytes, Path)):
            WRITING.append(str(path if not isinstance(path, bytes) else path.decode()))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"):
        WRITING.append(str(arguments[1] if event == "os.rename" else arguments[0]))


def test_nothing_is_written_outside_the_run_folder(small_arc, small_qwen, tmp_path, monkeypatch):
    from small_runs import SMALL, flags

    global WRITING
    monkeypatch.chdir(tmp_path)
    small = flags(**{**SMALL, "trackers": "auto", "qwen": small_qwen})
    sys.addaudithook(note_writes)
    WRITING = []
    try:
        assert call("train", "--dataset", str(small_arc), "--out", "runs", "--max-batches", "2", *small)[0] == 0
        (run,) = Path("runs").iterdir()
        assert call("eval", str(run))[0] == 0 and call("report", str(run))[0] == 0
        assert call("train", "--resume", str(run), "--max-batches", "3")[0] == 0
        written, WRITING = WRITING, None
    finally:
        WRITING = None
    inside, home = str(run.resolve()), [p for p in tmp_path.iterdir() if p.name != "runs"]
    outside = {
        path for path in map(str, written)
        if not str(Path(path).resolve()).startswith(inside) and path not in ("/dev/null", "runs")
    }  # fmt: skip
    assert len(written) > 20 and not outside and not home, (outside, home)
