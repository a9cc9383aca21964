"""Healthy loops by the hundred: transformers' architectures built tiny, peft's methods, torch's optimizers and losses.

Each entry is a name and a function that returns the arguments of `prove`; all of them must be proved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import X, Y, adamw, given
from sweep_models import ADAPTERS, CAUSAL, ENCODERS, SEQUENCES, adapter, language_model

Loop = tuple[str, str, Callable[[], dict[str, Any]]]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    name: lambda params, name=name: getattr(torch.optim, name)(params, lr=1e-3)
    for name in ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
} | {
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD:nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam:amsgrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "AdamW:foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW:fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "AdamW:long": lambda params: torch.optim.AdamW(params, lr=0.3),
    "Muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=1e-3),
}


def optimizer(name: str) -> dict[str, Any]:
    """A small network stepped by one of torch's optimizers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16, bias=name != "Muon"), nn.GELU(), nn.Linear(16, 3, bias=name != "Muon"))
    return given(lambda: F.cross_entropy(net(X), Y), net, OPTIMIZERS[name](list(net.parameters())))


T = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda out: F.cross_entropy(out, Y, label_smoothing=0.1),
    "nll": lambda out: F.nll_loss(out.log_softmax(1), Y),
    "mse": lambda out: F.mse_loss(out, T),
    "l1": lambda out: F.l1_loss(out, T),
    "smooth_l1": lambda out: F.smooth_l1_loss(out, T),
    "huber": lambda out: F.huber_loss(out, T),
    "bce": lambda out: F.binary_cross_entropy_with_logits(out, T.sigmoid()),
    "kl": lambda out: F.kl_div(out.log_softmax(1), T.softmax(1), reduction="batchmean"),
    "hinge": lambda out: F.multi_margin_loss(out, Y),
    "multilabel": lambda out: F.multilabel_soft_margin_loss(out, (T > 0).float()),
    "poisson": lambda out: F.poisson_nll_loss(out, T.abs()),
    "gaussian": lambda out: F.gaussian_nll_loss(out[:, :1], T[:, :1], F.softplus(out[:, 1:2]) + 0.1),
    "cosine": lambda out: F.cosine_embedding_loss(out, T, torch.ones(16)),
    "triplet": lambda out: F.triplet_margin_loss(out, T, T.flip(0)),
    "ctc": lambda out: F.ctc_loss(out.log_softmax(1)[:, None], torch.tensor([[1, 2, 1]]), [16], [3]),
    "focal": lambda out: ((1 - (p := out.log_softmax(1).gather(1, Y[:, None])).exp()) ** 2 * -p).mean(),
    "infonce": lambda out: F.cross_entropy(F.normalize(out) @ F.normalize(T).T / 0.1, torch.arange(16)),
    "logsumexp": lambda out: out.logsumexp(1).pow(2).mean(),
    "quantile": lambda out: torch.maximum(0.9 * (T - out), -0.1 * (T - out)).mean(),
    "sinkhorn": lambda out: torch.cdist(out, T).softmax(1).mul(torch.cdist(out, T)).sum(1).mean(),
}


def loss(name: str) -> dict[str, Any]:
    """A small network under one loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    return given(lambda: LOSSES[name](net(X)), net)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "group_norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 3)),
    "rms_norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)),
    "prelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 3)),
    "rrelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 3)),
    "alpha_dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.ConvTranspose1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    ),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(8, 3)
    ),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "orthogonal": lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "bilinear": lambda: nn.Sequential(nn.Linear(8, 8), nn.GLU(), nn.Softmax(1), nn.Linear(4, 3)),
}


def layer(name: str) -> dict[str, Any]:
    """A classifier with one kind of layer in it."""
    torch.manual_seed(0)
    net = LAYERS[name]()
    return given(lambda: F.cross_entropy(net(X), Y), net, adamw(net))


def loops() -> list[Loop]:
    """All of them: name, library, and what builds it."""
    found: list[Loop] = []
    for family, kinds in (
        ("AutoModelForCausalLM", CAUSAL),
        ("AutoModelForMaskedLM", ENCODERS),
        ("AutoModelForSeq2SeqLM", SEQUENCES),
    ):
        found += [(f"{family}:{kind}", "transformers", lambda k=kind, f=family: language_model(k, f)) for kind in kinds]
    found += [(name, "peft", lambda n=name: adapter(n)) for name in ADAPTERS]
    for make, names in ((optimizer, OPTIMIZERS), (loss, LOSSES), (layer, LAYERS)):
        found += [(f"{make.__name__}:{name}", "torch", lambda n=name, m=make: m(n)) for name in names]
    return found
