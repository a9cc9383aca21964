"""docs/proof_elsewhere.md: every block of it runs, against the library that it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from proof_cases import Pair, X, Y
from small_loops import Counting, counting_qwen
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "proof_elsewhere.md").read_text(encoding="utf-8")
BLOCKS = {
    heading: code for heading, code in re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```\w+\n(.*?)```", PAGE, re.M | re.S)
}


def test_page_has_a_block_for_each_way_of_at_most_ten_lines() -> None:
    assert list(BLOCKS) == ["transformers and trl", "Lightning", "pytest", "A script as it stands"]
    assert all(len(code.splitlines()) <= 10 for code in BLOCKS.values())


def test_transformers_block(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["transformers and trl"], {"model": counting_qwen(), "data": Counting()})
    assert "gradient proved" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_lightning_block(tmp_path, monkeypatch, capsys) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is an extra of development")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Pair()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["Lightning"], {"module": Module(), "loader": DataLoader(TensorDataset(X, Y), 4)})
    assert "gradient proved" in capsys.readouterr().out


def test_pytest_block() -> None:
    names = {
        "build": Pair,
        "example": lambda: (X, Y),
        "loss_of": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    }
    exec(BLOCKS["pytest"], names)
    names["test_gradient_reaches_every_parameter"]()
    names["build"] = lambda: Pair(lambda hidden: hidden.detach())
    with pytest.raises(AssertionError, match="2 connected BROKEN"):
        names["test_gradient_reaches_every_parameter"]()


TRAIN = """\
import argparse
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        # "saves memory"
        return self.head(torch.tanh(self.encoder(x)).detach())

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, required=True)
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=parser.parse_args().lr)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(torch.randn(16, 6)), torch.arange(16) % 3).backward()
    optimizer.step()
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "qwen_fused", "prove-script", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_script_block(tmp_path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    line, *ladder = BLOCKS["A script as it stands"].splitlines()
    done = command(tmp_path, *line.partition("prove-script ")[2].split())
    assert done.returncode == 1 and not done.stderr, done.stderr

    def untimed(text):
        return re.sub(r"\d+\.\d s$", "", text)

    assert [untimed(row) for row in done.stdout.splitlines()] == [untimed(row) for row in ladder]
