"""The fused loss and per-group gradient norms in a loop of one's own: a small convolution learns to mirror grids."""

import torch
import torch.nn as nn

import qwen_fused as qf

C, SIDE, T = 10, 6, 3  # colours, grid side, planning steps


class Planner(nn.Module):
    """A recurrent core that writes one plan per step: logits [B, T, C, H, W]."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Conv2d(C, width, 1)
        self.core = nn.Conv2d(width, width, 2 * SIDE - 1, padding=SIDE - 1)
        self.read = nn.Conv2d(width, C, 1)

    def forward(self, grid):
        state = self.embed(nn.functional.one_hot(grid, C).permute(0, 3, 1, 2).float())
        plan = []
        for _ in range(T):
            state = state + torch.tanh(self.core(state))
            plan.append(self.read(state))
        return torch.stack(plan, 1)


torch.manual_seed(0)
model = Planner()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
heads = [*model.embed.parameters(), *model.read.parameters()]
norms = qf.GroupGradNorm({"core": model.core.parameters(), "heads": heads})
weights = qf.EFEWeights(ce=1.0, risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)
step_weight = torch.tensor([0.1] * (T - 1) + [1.0])

for batch in range(61):
    grid = torch.randint(0, C, (16, SIDE, SIDE))
    out = qf.efe_loss(model(grid), grid.flip(2), step_weight=step_weight, weights=weights)
    optimizer.zero_grad()
    out.loss.backward()
    stats = norms.measure()
    norms.clip_(stats, 1.0)
    optimizer.step()
    if batch % 20 == 0:
        rows = stats.to_dict()
        print(
            f"batch {batch:2d}  loss {out.loss.item():.4f}  accuracy {out.accuracy.mean().item():.4f}  "
            + "  ".join(f"{name}_grad {rows[name]['norm']:.3f}" for name in ("core", "heads"))
        )
