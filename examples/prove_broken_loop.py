"""A loop whose loss falls while half of the model never learns, and the proof that names the line."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from qwen_fused.proof.prove import prove


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.reader = nn.GRU(16, 32, batch_first=True)
        self.project = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def prompt(self, text):
        hidden, _ = self.reader(text)
        return self.project(hidden.mean(1)).detach()  # "saves memory"

    def forward(self, text):
        return self.head(torch.tanh(self.prompt(text)))


torch.manual_seed(0)
model, text, label = Prompted(), torch.randn(64, 10, 16), torch.randint(0, 4, (64,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

for batch in range(200):
    loss = F.cross_entropy(model(text), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if batch % 199 == 0:
        print(f"batch {batch:3d}  loss {loss.item():.4f}")

report = prove(lambda: F.cross_entropy(model(text), label), model, optimizer)
print(report)
raise SystemExit(0 if report.ok else 1)
