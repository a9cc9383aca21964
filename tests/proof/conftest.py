"""A script's own part, run under prove-script."""

from __future__ import annotations

import textwrap

import pytest
import torch
from script_cases import HEAD

from qwen_fused.proof.script import prove_script


@pytest.fixture
def prove_text(tmp_path):
    """Text of a script's own part -> how its run ended, and the number of the line with `# here`, if any."""

    def run(body, *arguments, allow=()):
        text = HEAD + textwrap.dedent(body)
        script = tmp_path / "train.py"
        script.write_text(text)
        ended = prove_script(script, arguments, allow)
        lines = [number for number, line in enumerate(text.splitlines(), 1) if "# here" in line]
        assert not torch.overrides._get_current_function_mode_stack()
        return ended, lines[0] if lines else None

    return run
