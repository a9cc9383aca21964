"""The benches: timed in turns, refused when wrong, compared, drawn, told; `pytest bench/` finds them all."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

from qwen_fused.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
CPU = torch.device("cpu")
RESULTS = sorted((BENCH / "results").glob("*.json"))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    monkeypatch.setitem(harness.SECONDS, "quick", 0.02)


def comparison(check=lambda name: 0.0, **changes):
    from harness import Call, Comparison

    calls = {"ours": Call(lambda _: torch.ones(10).sum()), "other": Call(lambda _: torch.ones(200_000).exp().sum())}
    options = dict(bench="efe_loss", case="a 1x1 float32, both", calls=calls, ours="ours", device=CPU, check=check)
    return Comparison(**{**options, "bytes": 4_000_000_000, "operations": 10**9, **changes})


def record(rows, **machine) -> dict:
    told = {"device": "a device", "threads": 2, "torch": "2", "commit": "abc", "dirty": False, "load": 0.1}
    told |= {"kind": "cpu", "date": "today", "triton": None, "python": "3"}
    told |= {"load_at_end": 0.2, "clocks": {}, "clocks_at_end": {}}
    ceilings = {"copy_gb_per_s": 10.0, "read_gb_per_s": 12.0, "fp32_gflop_per_s": 100.0}
    return {"machine": {**told, **machine}, "level": "full", "ceilings": ceilings, "rows": rows}


def rows(**changes) -> list[dict]:
    from harness import measure

    return [{**vars(row), "commit": "abc", "load": 0.1, **changes} for row in measure(comparison(), "quick")]


def test_times_and_ratios():
    ours, other = rows()
    assert (ours["who"], ours["ours"], ours["times_ours"]) == ("ours", True, 1.0)
    assert other["times_ours"] > 2 and ours["p20"] <= ours["ms"] <= ours["p80"] and ours["rounds"] >= 3
    assert ours["gb_per_s"] == pytest.approx(4e9 / ours["ms"] / 1e6) and ours["launches"] is None


def test_share_of_the_work_is_counted(monkeypatch):
    import harness

    clock = iter([10.0, 13.0])
    monkeypatch.setattr(harness, "CLOCK", lambda: next(clock))
    # three seconds for six calls that do a quarter of the work each
    assert harness.timed(harness.Call(lambda _: None, share=0.25), CPU, 6) == 2.0


@pytest.mark.parametrize("error", [2e-5, float("nan")])
def test_a_wrong_result_is_not_timed(error):
    from harness import Call, WrongResult, measure, refuse

    calls = []
    wrong = comparison(lambda name: refuse(name, error, 1e-5), calls={"ours": Call(calls.append)})
    with pytest.raises(WrongResult, match="ours is wrong"):
        measure(wrong, "quick")
    assert not calls


def test_each_contender_is_called_no_more_than_it_must(monkeypatch):
    import harness
    from harness import Call, measure

    calls = []
    monkeypatch.setattr(harness, "first_call", lambda call, device: (call.run(None) or 5.0, None))
    measure(comparison(calls={"ours": Call(lambda _: calls.append("ours"))}), "quick")
    # what takes seconds: once for its memory and to be warm, then the fewest rounds
    assert len(calls) == 1 + harness.FEWEST


def test_the_losses_are_refused_when_wrong(monkeypatch):
    import bench_efe_loss
    from harness import WrongResult

    monkeypatch.setitem(bench_efe_loss.SHAPES, "arc", (2, 2, 10, 5, 5))
    (forward, *_) = bench_efe_loss.compare("arc", torch.float32, CPU)
    assert forward.check("eager") < 1e-5
    right = bench_efe_loss.eager
    wrong = {"eager": lambda **case: 1.001 * right(**case)}
    monkeypatch.setattr(bench_efe_loss, "contenders", lambda device, launches_tell: wrong)
    (forward, *_) = bench_efe_loss.compare("arc", torch.float32, CPU)
    with pytest.raises(WrongResult):
        forward.check("eager")


def test_norms_clip_at_every_call(monkeypatch, gradient_path):
    import bench_grad_norm
    from harness import WrongResult

    shapes = {"a": [torch.Size([30])], "b": [torch.Size([7, 3])] * 2}
    monkeypatch.setattr(bench_grad_norm, "shapes_of", lambda case: shapes)
    found = dict(zip(bench_grad_norm.TITLES, bench_grad_norm.compare("x", torch.float32, CPU), strict=True))
    measuring, clipping, _ = found.values()
    assert measuring.check("qwen-fused") < 1e-5 and clipping.check("qwen-fused") < 1e-5
    for call in clipping.calls.values():
        for _ in range(3):
            call.prepare()
            before = call.run(None)
            assert (measuring.calls["qwen-fused"].run(None) < 0.99 * before).any()
    monkeypatch.setattr(bench_grad_norm.GroupGradNorm, "clip_", lambda *_: None)
    clipping = list(bench_grad_norm.compare("x", torch.float32, CPU))[1]
    with pytest.raises(WrongResult, match="clipping"):
        clipping.check("qwen-fused")


def test_the_window_shares_prompts():
    from bench_window import BATCHES, batches_of

    for visits, prompts in ((10, 4), (4, 12), (1, 40)):
        batches = batches_of(visits, 4)
        assert [len(b) for b in batches] == [4] * BATCHES
        assert len({e.demonstrations for b in batches for e in b}) == prompts
        assert not any(pair.input is e.query for b in batches for e in b for pair in e.demonstrations)


def test_twenty_tasks_load():
    from material import TWENTY

    from qwen_fused.arc.episodes import load_tasks

    found = load_tasks(str(TWENTY))
    assert len(found.tasks) == 20 and not found.skipped and all(len(task.train) >= 3 for task in found.tasks)


@pytest.mark.parametrize(
    "factor, spread, code",
    [(1.05, 0.0, 0), (1.3, 0.0, 1), (1.3, 0.2, 0), (0.5, 0.0, 0)],
)
def test_compare_tells_what_is_slower_than_by_noise(tmp_path, capsys, factor, spread, code):
    from compare import compare

    before, after = tmp_path / "a.json", tmp_path / "b.json"
    row, _ = rows()
    row |= {"ms": 1.0, "p20": 1 - spread, "p80": 1 + spread}
    before.write_text(json.dumps(record([row])))
    after.write_text(json.dumps(record([row | {"ms": factor, "p20": factor - spread, "p80": factor + spread}])))
    assert compare(before, after) == code
    out = capsys.readouterr().out
    assert f"{factor:.2f}" in out and ("SLOWER" in out) == bool(code)


def test_pictures_and_tables(tmp_path, monkeypatch):
    import draw
    import tables

    result = record(rows())
    for picture in (draw.roofline, draw.bars):
        path = tmp_path / "x.png"
        assert picture(result, path) and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert not draw.roofline(record(rows(bytes=None)), path)
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{tables.BEGIN}old{tables.END}after")
    monkeypatch.setattr(tables, "DOCUMENT", document)
    (tmp_path / "device.json").write_text(json.dumps(result))
    # a picture that was not drawn is no link
    (tmp_path / "device-roofline.png").touch()
    tables.refresh(tmp_path)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith(f"{tables.END}after") and "old" not in text
    assert "| **ours** |" in text and "abc" in text and "device-roofline.png" in text
    assert "device-bars.png" not in text


def test_the_document_is_what_the_results_say():
    import tables

    text = tables.DOCUMENT.read_text()
    written = "".join(tables.section(json.loads(path.read_text()) | {"path": path}) for path in RESULTS)
    assert written in text, "run qwen-fused bench --redraw"


@pytest.mark.parametrize(
    "line, named",
    [
        ("--fast", "--fast"),
        ("--only losses", "losses"),
        ("--threads 0", "threads must be at least 1, got 0"),
        ("--compare a.json", "--compare"),
        ("--compare /nowhere/a.json /nowhere/b.json", "/nowhere/a.json"),
        (f"--compare {ROOT / 'pyproject.toml'} {ROOT / 'pyproject.toml'}", "pyproject.toml"),
    ],
)
def test_bad_arguments_get_one_sentence(line, named, capfd):
    assert cli.main(["bench", *line.split()]) == 2
    error = capfd.readouterr().err
    assert error.startswith("qwen-fused: ") and named in error and len(error.strip().splitlines()) == 1


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "qwen_fused" / "cli" / "main.py"))
    assert cli.main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "needs a checkout" in error and len(error.strip().splitlines()) == 1


def test_pytest_finds_every_bench(request):
    assert "bench_*.py" in request.config.getini("python_files")
    for path in BENCH.glob("bench_*.py"):
        module = importlib.import_module(path.stem)
        tests = [name for name in dir(module) if name.startswith("test_")]
        assert tests and callable(module.comparisons), path
        assert all("benchmark" in inspect.signature(getattr(module, name)).parameters for name in tests), path


def test_peak_memory_is_that_of_the_call():
    from harness import Call, peak_mb

    peak = peak_mb(Call(lambda _: torch.ones(50_000_000)), CPU)
    assert peak is None or 190 < peak < 230


def test_a_part_renewed_keeps_the_rest(tmp_path):
    from suite import BENCHES, kept

    path = tmp_path / "x.json"
    window, step = ({"bench": name, "case": "a case", "who": "ours"} for name in ("window", "step"))
    path.write_text(json.dumps(record([window, step])))
    assert kept(path, record([]), ["step"]) == [window]
    assert kept(path, record([], torch="3"), ["step"]) == []
    assert kept(path, record([]), list(BENCHES)) == []


def test_what_is_no_result_is_not_built_on(tmp_path, capfd):
    path = tmp_path / "x.json"
    path.write_text('{"rows": 1}')
    line = ["bench", "--quick", "--device", "cpu", "--only", "grad_norm", "--out", str(path)]
    assert cli.main(line) == 2 and path.read_text() == '{"rows": 1}'
    error = capfd.readouterr().err
    assert error.startswith("qwen-fused: ") and str(path) in error and len(error.strip().splitlines()) == 1


def test_graphs_of_the_step_are_compared_and_refused_when_wrong(monkeypatch, capsys, tmp_path):
    import graph_step
    from harness import WrongResult

    monkeypatch.setattr(graph_step, "WINDOW", 3)
    monkeypatch.setattr("sys.argv", ["graph_step.py", "--cpu", "--rounds", "1", "--out", str(tmp_path)])
    assert graph_step.main() == 0
    assert "times as fast with graphs" in capsys.readouterr().out
    found = json.loads((tmp_path / "graph_step-fp32-own.json").read_text())
    assert set(found["rows"]) == {"eager", "graphs"} and found["apart"] < 1e-4 and len(found["shapes"]) > 0
    real = graph_step.Loop.window

    def wrong(loop) -> list[float]:
        return [*real(loop)[:-1], float("nan") if loop.trainer.graphs else 1.0]

    monkeypatch.setattr(graph_step.Loop, "window", wrong)
    with pytest.raises(WrongResult, match="the replayed step's loss"):
        graph_step.main()


def test_cost_of_a_proof_is_told_and_refused_when_the_loop_is_broken():
    import proof_cost
    from harness import WrongResult

    def small(cut: bool = False) -> proof_cost.Loop:
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        x = torch.ones(3, 4)

        def loss() -> torch.Tensor:
            hidden = net[1](net[0](x))
            return net[2](hidden.detach() if cut else hidden).square().mean()

        return proof_cost.Loop(net, optimizer, loss)

    found = proof_cost.cost("small", small, 2)
    assert found.in_steps > 1 and found.weight_mb == 100e-6
    assert str(found).startswith("small: a step")
    with pytest.raises(WrongResult, match="gradient broken"):
        proof_cost.cost("cut", lambda: small(cut=True), 1)
