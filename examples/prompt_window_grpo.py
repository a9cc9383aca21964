"""PromptWindow in a GRPO-like loop: several batches of sampled groups share one pass through a costly encoder.

Each group samples K actions under one prompt; an action's advantage is its reward against its group's. The encoder
stands still for a window, is passed through once per prompt, and receives the window's whole gradient in `flush`.
"""

import torch
import torch.nn as nn

import qwen_fused as qf

K, ACTIONS, WINDOW = 8, 6, 5  # samples per prompt, choices, batches per window

torch.manual_seed(0)
texts = torch.randint(0, 50, (12, 20))  # twelve prompts of twenty tokens
right = torch.randint(0, ACTIONS, (12,))
encoder = nn.Sequential(nn.Embedding(50, 32), nn.Flatten(), nn.Linear(20 * 32, 64), nn.Tanh())
policy = nn.Linear(64, ACTIONS)
slow = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
fast = torch.optim.AdamW(policy.parameters(), lr=1e-2)
passes = []


def encode(keys):
    passes.append(len(keys))
    return encoder(texts[keys])


window = qf.PromptWindow(encode, size=WINDOW)
for batch in range(60):
    keys = torch.randint(0, 12, (6,)).tolist()
    choice = torch.distributions.Categorical(logits=policy(window.prompts(keys)))
    action = choice.sample((K,))  # [K, 6]
    reward = (action == right[keys]).float()
    advantage = (reward - reward.mean(0)) / (reward.std(0) + 1e-4)
    loss = -(advantage * choice.log_prob(action)).mean()
    loss.backward()
    fast.step()
    fast.zero_grad()
    if window.full:
        window.flush(1 / WINDOW)
        slow.step()
        slow.zero_grad()
    if batch % 20 in (0, 19):
        print(f"batch {batch:2d}  reward {reward.mean().item():.3f}  prompts encoded {sum(passes)}")
