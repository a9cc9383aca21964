"""The campaign's checks of the ops on a device: gradients, repeatability, CUDA graphs, host syncs, and a profile."""

from __future__ import annotations

import contextlib
import itertools

import torch
from bench_efe_loss import LEAVES, WEIGHTS, backend_of, both, fused, make_case, shape_of
from bench_grad_norm import SMALL, make
from devices import no_sync, record, synchronize
from efe_cases import ALL_TERMS, DIFFERENTIABLE
from efe_cases import make_case as make_small
from torch import Tensor

from qwen_fused.loss.efe_loss import efe_loss
from qwen_fused.norms.group_grad_norm import GroupGradNorm


def device_of(arguments) -> torch.device:
    return torch.device("cpu" if arguments.cpu else "cuda")


def small_case(device: torch.device, dtype: torch.dtype, **shape: int) -> dict[str, Tensor]:
    case = {name: x.to(device) for name, x in make_small(dtype=dtype, **shape).items()}
    return {name: x.requires_grad_() if name in DIFFERENTIABLE else x for name, x in case.items()}


def full_size(device: torch.device) -> tuple[dict[str, Tensor], dict]:
    """A batch's loss, and the gradients of 2000 small tensors in groups."""
    return make_case(shape_of("arc", device), torch.float32, device), make(SMALL, torch.float32, device)


def gradcheck(arguments) -> str:
    """Finite differences in float64, of the compiled kernels on the device."""
    device = device_of(arguments)
    case = small_case(device, torch.float64, B=2, T=2, C=3, H=2, W=2)
    for mode in ("episode", "cell", "none"):

        def loss(*leaves: Tensor, mode=mode) -> Tensor:
            inputs = {**case, **dict(zip(DIFFERENTIABLE, leaves, strict=True))}
            return efe_loss(**inputs, weights=ALL_TERMS, hard_mode=mode, backend=backend_of(device)).loss

        torch.autograd.gradcheck(loss, [case[name] for name in DIFFERENTIABLE])
    return f"{len(DIFFERENTIABLE)} inputs in float64, three hard modes, {backend_of(device)}"


def repeat(arguments) -> str:
    """The same bits, run after run, on this stream and on another."""
    device = device_of(arguments)
    case, groups = full_size(device)
    norms = GroupGradNorm(groups)

    def results() -> list[Tensor]:
        loss = both(fused, case).detach()
        stats = norms.measure()
        return [loss, *(case[name].grad for name in LEAVES), stats.norm, stats.max_abs]

    first = [x.clone() for x in results()]
    other = torch.cuda.Stream(device) if device.type == "cuda" else None
    runs = 20
    for number in range(runs):
        synchronize(device)
        with torch.cuda.stream(other) if other and number % 2 else contextlib.nullcontext():
            found = results()
            synchronize(device)
        for one, two in zip(first, found, strict=True):
            assert torch.equal(one, two), f"run {number} differs by {(one - two).abs().max():.1e}"
    return f"loss, 4 gradients, norms of 2000 tensors: {runs} runs bitwise equal"


def graph(arguments) -> str:
    """A recorded graph gives, on new inputs, what a fresh call gives."""
    device = device_of(arguments)
    case, groups = full_size(device)
    norms = GroupGradNorm(groups)
    gradients = [p.grad for group in groups.values() for p in group]

    def step() -> tuple[Tensor, ...]:
        loss = both(fused, case).detach()
        return loss, *(case[name].grad for name in LEAVES)

    def clip() -> tuple[Tensor, ...]:
        stats = norms.measure()
        norms.clip_(stats, 1e-3)
        return (stats.norm,)

    for body, renewed in ((step, [case[name] for name in LEAVES]), (clip, gradients)):
        recorded, replay = record(device, body)
        for _ in range(3):
            with torch.no_grad():
                torch._foreach_mul_(renewed, 1.7)
            kept = [x.detach().clone() for x in renewed]
            replay()
            got = [x.clone() for x in (*recorded, *renewed)]
            with torch.no_grad():
                torch._foreach_copy_(renewed, kept)
            for one, two in zip(got, (*body(), *renewed), strict=True):
                assert torch.equal(one, two), f"a replay of {body.__name__} differs by {(one - two).abs().max():.1e}"
    return "loss with its gradients, and measure with clip_: replays equal fresh calls bitwise"


def trainer_of(arguments):
    from material import TWENTY

    from qwen_fused.config import TrainConfig
    from qwen_fused.train.trainer import Trainer

    size = dict(batch_size=4, agent_channels=16, plan_steps=2) if arguments.cpu else {}
    config = TrainConfig(dataset=str(TWENTY), device=device_of(arguments).type, prompt_window=3, prove=False, **size)
    return Trainer(config, arguments.out / "logs" / "trainer")


def steps(trainer, count: int):
    """Steps of the trainer's own loop, flushes included."""
    for number in range(count):
        index = number % min(3, trainer.sampler.batches_per_epoch())
        yield trainer.train_step(trainer.sampler.batch(0, index), 1, flush=trainer.sampler.ends_window(index))


def sync(arguments) -> str:
    """Loss, norms, clipping and the trainer's step under sync-debug "error"."""
    device = device_of(arguments)
    case, groups = full_size(device)
    norms = GroupGradNorm(groups)

    def ops() -> None:
        both(fused, case)
        norms.clip_(norms.measure(), 1e-3)

    ops()
    synchronize(device)
    with no_sync(device):
        ops()
    trainer = trainer_of(arguments)
    pending = list(steps(trainer, 6))
    synchronize(device)
    with no_sync(device):
        pending += list(steps(trainer, 6))
    for batch in pending:
        trainer.read(batch)
    return "loss, measure, clip_, and 6 steps of the trainer with 2 flushes: no host sync"


def small(arguments) -> str:
    """Every kernel on small, odd shapes: what the sanitizers watch."""
    device, count = device_of(arguments), 0
    for dtype, (H, W), weighted in itertools.product((torch.float32, torch.bfloat16), ((1, 1), (7, 5)), (True, False)):
        case = small_case(device, dtype, B=2, T=2, C=10, H=H, W=W, weighted=weighted)
        efe_loss(**case, weights=ALL_TERMS, backend=backend_of(device)).loss.backward()
        sizes = (0, 1, 37, 4099)
        leaves = [torch.zeros(n + 1, device=device, dtype=dtype)[1:].requires_grad_() for n in sizes]
        for leaf in leaves:
            # one element off: unaligned
            leaf.grad = torch.ones(leaf.numel() + 1, device=device, dtype=dtype)[1:]
        norms = GroupGradNorm({"a": leaves[:2], "b": leaves[2:]})
        norms.clip_(norms.measure(0.5), 0.1)
        count += 1
    synchronize(device)
    return f"{count} shapes of loss, measure and clip_"


def large(arguments) -> str:
    """Each kernel on sizes that fill the device: what ncu reads."""
    device = device_of(arguments)
    case = make_case(shape_of("large", device), torch.float32, device)
    efe_loss(**case, weights=WEIGHTS, backend=backend_of(device)).loss.backward()
    groups = make("qwen2.5-0.5b", torch.float32, device)
    norms = GroupGradNorm(groups)
    norms.clip_(norms.measure(), 1e-3)
    synchronize(device)
    return "loss, measure, clip_"


def profile(arguments) -> str:
    """torch.profiler over the trainer's step: what takes the device's time, and how much of it the device works."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    device, trainer = device_of(arguments), trainer_of(arguments)
    list(steps(trainer, 3))
    synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profiler(activities=activities) as trace:
        list(steps(trainer, 3))
        synchronize(device)
    events = trace.key_averages()
    kind = "device" if device.type == "cuda" else "cpu"
    print(events.table(sort_by=f"self_{kind}_time_total", row_limit=40))
    trace.export_chrome_trace(str(arguments.out / "trace.json.gz"))
    times = sorted(((getattr(e, f"self_{kind}_time_total"), e.key) for e in events), reverse=True)
    total = sum(time for time, _ in times)
    wall = max(e.time_range.end for e in trace.events()) - min(e.time_range.start for e in trace.events())
    first = ", ".join(f"{key[:40]} {100 * time / total:.0f} %" for time, key in times[:3])
    return f"{kind} busy {100 * total / wall:.0f} % of {wall / 3e3:.1f} ms a step; most: {first}"
