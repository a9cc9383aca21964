"""Healthy scripts of many kinds under prove-script: none is called broken, none crashes, none goes on for long."""

from __future__ import annotations

import textwrap

import pytest

from qwen_fused.proof.script import prove_script

HEAD = """
import copy
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
x, y = torch.randn(16, 6), torch.arange(16) % 3
mlp = lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, o))
adam = lambda *modules, lr=1e-3: torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=lr)
"""
LOOP = """
for step in range(50):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
raise AssertionError("went on")
"""
# the script's own part, and whether LOOP follows
KINDS = {
    "recurrent, state detached between chunks": """
        net, head, state = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3), None
        optimizer = adam(net, head)
        def loss():
            global state
            out, state = net(torch.randn(4, 5, 6), state)
            state = tuple(s.detach() for s in state)
            return head(out).square().mean()
        """,
    "packed sequences, CTC": """
        from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
        net, head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5)
        optimizer = adam(net, head)
        def loss():
            packed = pack_padded_sequence(torch.randn(3, 7, 6), torch.tensor([7, 6, 5]), batch_first=True)
            out = pad_packed_sequence(net(packed)[0], batch_first=True)[0]
            log = head(out).log_softmax(-1).transpose(0, 1)
            return F.ctc_loss(log, torch.randint(1, 5, (3, 2)), torch.tensor([7, 6, 5]), torch.tensor([2, 2, 2]))
        """,
    "variational": """
        encoder, decoder = mlp(6, 4), mlp(2, 6)
        optimizer = adam(encoder, decoder)
        def loss():
            mu, log = encoder(x).chunk(2, -1)
            z = torch.distributions.Normal(mu, log.exp()).rsample()
            return F.mse_loss(decoder(z), x) + 0.1 * (mu.square() + log.exp() - log).mean()
        """,
    "policy gradient": """
        policy = mlp(6, 3)
        optimizer = adam(policy)
        def loss():
            d = torch.distributions.Categorical(logits=policy(x))
            action = d.sample()
            reward = (action == y).float()
            return -(d.log_prob(action) * (reward - reward.mean())).mean()
        """,
    "Q learning with a target network": """
        net = mlp(6, 3)
        target = copy.deepcopy(net)
        optimizer = adam(net)
        def loss():
            with torch.no_grad():
                wanted = 1 + 0.9 * target(x).max(1).values
            return F.smooth_l1_loss(net(x).gather(1, net(x).argmax(1, keepdim=True)).squeeze(1), wanted)
        """,
    "momentum encoder": """
        query, key = mlp(6, 4), mlp(6, 4)
        key.load_state_dict(query.state_dict())
        key.requires_grad_(False)
        optimizer = adam(query)
        def loss():
            with torch.no_grad():
                for q, k in zip(query.parameters(), key.parameters()):
                    k.mul_(0.9).add_(q, alpha=0.1)
            return F.cross_entropy(F.normalize(query(x)) @ F.normalize(key(x)).T, torch.arange(16))
        """,
    "gradient penalty": """
        critic = mlp(6, 1)
        optimizer = adam(critic)
        def loss():
            at = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(critic(at).sum(), at, create_graph=True)
            return critic(x).square().mean() + (slope.norm(dim=1) - 1).square().mean()
        """,
    "meta learning": """
        net = mlp(6, 3)
        optimizer = adam(net)
        def loss():
            weights = dict(net.named_parameters())
            inner = F.cross_entropy(torch.func.functional_call(net, weights, x), y)
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            moved = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), slopes)}
            return F.cross_entropy(torch.func.functional_call(net, moved, x), y)
        """,
    "mixture of experts": """
        router, experts = nn.Linear(6, 2), nn.ModuleList([mlp(6, 3) for _ in range(2)])
        optimizer = adam(router, experts)
        def loss():
            weight, chosen = router(x).softmax(-1).topk(1)
            out = torch.zeros(16, 3)
            for number, expert in enumerate(experts):
                rows = (chosen == number).any(-1)
                out = out.index_put((rows.nonzero().squeeze(-1),), expert(x[rows]) * weight[rows])
            return F.cross_entropy(out, y)
        """,
    "bias before a normalisation": """
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        loss = lambda: F.cross_entropy(net(x), y)
        """,
    "layers dropped at random": """
        layers, head = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)]), nn.Linear(6, 3)
        optimizer, turn = adam(layers, head), 0
        def loss():
            global turn
            turn += 1
            h = x
            for number, layer in enumerate(layers):
                h = layer(h).tanh() if (number + turn) % 2 else h
            return F.cross_entropy(head(h), y)
        """,
    "sparse embedding": """
        table = nn.Embedding(32, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-2)
        loss = lambda: table(torch.arange(16)).square().mean()
        """,
    "tied weights, transformer": """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(12, 8)
                self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
                self.head = nn.Linear(8, 12, bias=False)
                self.head.weight = self.table.weight
            def forward(self, tokens):
                mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
                return self.head(self.body(self.table(tokens), mask=mask, is_causal=True))
        net = Model()
        optimizer = adam(net)
        tokens = torch.randint(12, (4, 6))
        loss = lambda: F.cross_entropy(net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        """,
    "normalised weights, scripted part": """
        part = torch.jit.script(nn.Linear(8, 8))
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), part,
                            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)))
        optimizer = adam(net)
        loss = lambda: F.cross_entropy(net(x), y)
        """,
    "batch of models": """
        nets = [mlp(6, 3) for _ in range(3)]
        params, buffers = torch.func.stack_module_state(nets)
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        optimizer = torch.optim.SGD(params.values(), lr=0.1)
        base = copy.deepcopy(nets[0]).to("meta")
        def loss():
            run = lambda p, b: torch.func.functional_call(base, (p, b), (x,))
            return torch.vmap(run)(params, buffers).square().mean()
        """,
    "quantised with a straight-through estimator": """
        class Round(torch.autograd.Function):
            @staticmethod
            def forward(ctx, h):
                return h.round()
            @staticmethod
            def backward(ctx, grad):
                return grad
        net, head = mlp(6, 8), nn.Linear(8, 3)
        optimizer = adam(net, head)
        loss = lambda: F.cross_entropy(head(Round.apply(4 * net(x))), y)
        """,
    "gumbel, fake quantisation": """
        net, head = mlp(6, 8), nn.Linear(8, 3)
        optimizer = adam(net, head)
        def loss():
            hard = F.gumbel_softmax(net(x), hard=True)
            return F.cross_entropy(head(hard + torch.fake_quantize_per_tensor_affine(hard, 0.1, 0, -127, 127)), y)
        """,
    "scaled for fp16, clipped": """
        net = mlp(6, 3)
        optimizer = adam(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(9):
            with torch.autocast("cpu", torch.float16):
                value = F.cross_entropy(net(x), y)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert step == 0
        """,
    "sharpness-aware, in two passes": """
        net = mlp(6, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(9):
            assert step == 0
            F.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                moves = [0.05 * p.grad / p.grad.norm() for p in net.parameters()]
                for p, move in zip(net.parameters(), moves):
                    p.add_(move)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for p, move in zip(net.parameters(), moves):
                    p.sub_(move)
            optimizer.step()
        """,
    "averaged, scheduled, validated": """
        from torch.optim.swa_utils import AveragedModel
        net = mlp(6, 3)
        average, optimizer = AveragedModel(net), adam(net)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
        best, history = float("inf"), []
        for epoch in range(3):
            assert epoch == 0
            net.eval()
            with torch.inference_mode():
                history.append(F.cross_entropy(net(x), y).item())
            best = min(best, history[-1])
            net.train()
            value = F.cross_entropy(net(x), y)
            value.backward()
            optimizer.step()
            average.update_parameters(net)
            schedule.step()
        """,
    "distributed, one process": """
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            net = nn.parallel.DistributedDataParallel(mlp(6, 3))
            optimizer = adam(net)
            for step in range(9):
                assert step == 0
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        finally:
            dist.destroy_process_group()
        """,
    "optimizer before the model moves": """
        net = mlp(6, 3)
        optimizer = adam(net)
        net.to(torch.float64)
        torch.manual_seed(1)
        loss = lambda: F.cross_entropy(net(x.double()), y)
        """,
    "saved and loaded after the optimizer was made": """
        import io
        net = mlp(6, 3)
        optimizer = adam(net)
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        loss = lambda: F.cross_entropy(net(x), y)
        """,
    "complex numbers": """
        phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        head = nn.Linear(6, 3)
        optimizer = torch.optim.Adam([phase, *head.parameters()])
        loss = lambda: F.cross_entropy(head(torch.fft.ifft(torch.fft.fft(x) * phase).real), y)
        """,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_healthy(kind, tmp_path) -> None:
    body = textwrap.dedent(KINDS[kind])
    script = tmp_path / "train.py"
    script.write_text(HEAD + body + ("" if ".step(" in body else LOOP))
    run = prove_script(script)
    assert not run.error, run.error
    assert run.report is not None and run.report.verdict == "proved", run.report
