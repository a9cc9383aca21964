"""`qwen-fused prove-script`: exit codes, and whose arguments are whose."""

from __future__ import annotations

import json

import pytest

from qwen_fused.cli.main import main
from qwen_fused.cli.prove_script import split

SCRIPT = """
import sys
import torch
from torch import nn
net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
hidden = net[0](torch.randn(8, 4))
if "--cut" in sys.argv:
    hidden = hidden.detach()
if "--fail" in sys.argv:
    raise ValueError("of its own")
if "--leave" in sys.argv:
    sys.exit("nothing to do")
if "--stay" not in sys.argv:
    net[1](hidden).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "train.py").write_text(SCRIPT)
    return str(tmp_path / "train.py")


def test_exit_codes(script, capsys, tmp_path) -> None:
    assert main(["prove-script", script]) == 0
    assert capsys.readouterr().out.startswith("gradient proved")
    assert main(["prove-script", "--json", str(tmp_path / "report.json"), script, "--cut"]) == 1
    out = capsys.readouterr().out
    assert "2 connected BROKEN" in out and "train.py:9 in <module>" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "broken" and report["cut"]["line"] == 9
    assert main(["prove-script", "--allow", "0.*", "--allow=detach", script, "--cut"]) == 0
    assert main(["prove-script", str(tmp_path / "no.py")]) == 2
    assert "script must be a Python file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, code, said",
    [
        ("--stay", 1, "ended before any torch optimizer stepped"),
        ("--leave", 1, "left with 'nothing to do' before any torch optimizer stepped"),
        ("--fail", 1, "ended with the exception above before any torch optimizer stepped"),
    ],
)
def test_script_that_never_steps(script, capsys, flag, code, said) -> None:
    assert main(["prove-script", script, flag]) == code
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"qwen-fused: {script} {said}"
    assert ("ValueError: of its own" in err) == (flag == "--fail")


def test_arguments_wrong_for_the_script_itself(tmp_path, capsys) -> None:
    (tmp_path / "strict.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    assert main(["prove-script", str(tmp_path / "strict.py"), "--what"]) == 2
    assert "unrecognized arguments: --what" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--json", "x"], ["--nonsense", "x", "train.py"]])
def test_wrong_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["prove-script", *arguments])
    assert left.value.code == 2


def test_whose_arguments_are_whose() -> None:
    assert split(["train.py", "--json", "a", "b"]) == (["train.py"], ["--json", "a", "b"])
    assert split(["--json", "a", "train.py", "--help"]) == (["--json", "a", "train.py"], ["--help"])
    assert split(["--allow=x", "--allow", "y", "t.py"]) == (["--allow=x", "--allow", "y", "t.py"], [])
    assert split(["-h"]) == (["-h"], []) and split([]) == ([], [])
