"""Nothing that a run, model or data folder holds is ever executed: no pickle is opened, no code of a model is run."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch

import qwen_fused
from qwen_fused.arc.reader import load_tasks
from qwen_fused.cli import main as cli
from qwen_fused.qwen.backbone import load_backbone, save_backbone

ROOT = Path(qwen_fused.__file__).resolve().parent.parent
SOURCES = [path for folder in ("qwen_fused", "kernels", "examples", "bench") for path in (ROOT / folder).rglob("*.py")]
# what executes what it reads, or may be told to
FORBIDDEN = {
    "eval", "exec", "pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "torch.load", "numpy.load", "np.load",
    "yaml.unsafe_load", "yaml.full_load", "torch.hub.load",
}  # fmt: skip


def calls(path: Path) -> list[tuple[int, str, dict[str, ast.expr]]]:
    """Every import and call of a file: line, dotted name, keywords."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name, {}) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or "", {}))
        elif isinstance(node, ast.Call):
            found.append((node.lineno, ast.unparse(node.func), {k.arg: k.value for k in node.keywords if k.arg}))
    return found


def test_no_source_can_execute_what_it_reads():
    assert len(SOURCES) > 60
    for path in SOURCES:
        for line, name, keywords in calls(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            assert name not in FORBIDDEN, f"{where} {name}"
            trust = keywords.get("trust_remote_code")
            assert trust is None or ast.unparse(trust) == "False", f"{where} trusts remote code"
            assert "allow_pickle" not in keywords and "weights_only" not in keywords, where
            if name == "AutoModel.from_pretrained" and "qwen_fused/" in where:
                assert ast.unparse(keywords["use_safetensors"]) == "True", where


@pytest.fixture
def bomb(tmp_path):
    """An object whose unpickling leaves a file, and whether it has."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    yield Bomb()
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_is_live(tmp_path, bomb):
    pickle.loads(pickle.dumps(bomb)).close()
    (tmp_path / "exploded").unlink()


@pytest.mark.parametrize("write", [lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), torch.save])
def test_pickled_checkpoint_is_refused(tmp_path, bomb, write, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    for name in ("step-000001.safetensors", "best.safetensors"):
        write(bomb, run / "checkpoints" / name)
    for words in (["train", "--resume", str(run)], ["eval", str(run)], ["eval", str(run), "--weights", "best"]):
        assert cli.main(words) == 2
        assert "safetensors" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved Qwen that loads."""
    save_backbone(*load_backbone("tiny"), tmp_path / "qwen")
    return tmp_path / "qwen"


def test_pickled_weights_of_a_model_are_refused(folder, bomb):
    (folder / "model.safetensors").unlink()
    torch.save({"embed_tokens.weight": bomb}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights in .* do not load"):
        load_backbone(str(folder))
    # and good ones too: the format is refused, not the contents
    torch.save(load_backbone("tiny")[0].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights in .* do not load"):
        load_backbone(str(folder))


CODE = "open({!r}, 'w').close()\nfrom transformers import Qwen2Config as Config, Qwen2Model as Model\n"


@pytest.mark.parametrize("model_type", ["qwen2", "own"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_folder_is_refused_and_not_run(folder, tmp_path, model_type, file):
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "exploded")))
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    if file == "config.json":
        content |= {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}, "model_type": model_type}
    else:
        content |= {"auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]}}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="qwen: .*(code of its own|cannot be read|no tokenizer that loads)"):
        load_backbone(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_pickled_tasks_are_left_out(tmp_path, bomb):
    (tmp_path / "t.json").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="is not JSON"):
        load_tasks(str(tmp_path))
