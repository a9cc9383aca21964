"""Healthy loops of transformers, peft and accelerate that were called broken once."""

from __future__ import annotations

import socket

import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import X, Y, adamw, case, classified, given

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@case("transformers")
def adafactor_without_a_rate():
    from transformers.optimization import Adafactor

    net = nn.Linear(8, 3)
    return classified(net, optimizer=Adafactor(net.parameters(), relative_step=True, warmup_init=False))


@case("transformers", says="warm-up holds the learning rate")
def linear_warm_up_from_zero():
    from transformers import get_linear_schedule_with_warmup

    net = nn.Linear(8, 3)
    optimizer = adamw(net)
    get_linear_schedule_with_warmup(optimizer, 10, 100)
    return classified(net, optimizer=optimizer)


@case("transformers")
def experts_by_grouped_matrix_products():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(
        **SIZES,
        **linear,
        **experts,
        head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model, ids = Qwen3NextForCausalLM(config).train(), torch.randint(3, 99, (2, 12))
    return given(lambda: model(input_ids=ids, labels=ids).loss, model)


@case("accelerate")
def optimizer_that_accelerate_wraps():
    from accelerate import Accelerator

    accelerator, net = Accelerator(cpu=True), nn.Linear(8, 3)
    net, optimizer = accelerator.prepare(net, adamw(net))
    loss = lambda: F.cross_entropy(net(X), Y)  # noqa: E731
    return given(loss, net, optimizer, backward=accelerator.backward)


@case("peft")
def preference_loss_with_the_adapter_disabled():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])).train()
    better, worse = torch.randint(0, 99, (2, 12)), torch.randint(0, 99, (2, 12))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)

    def log_prob(ids):
        scores = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return scores.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)

    def loss():
        with torch.no_grad(), model.disable_adapter():
            before = log_prob(better), log_prob(worse)
        return -F.logsigmoid(0.1 * (log_prob(better) - before[0] - log_prob(worse) + before[1])).mean()

    return given(loss, model)


def one_process():
    """A process group of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    return dist


@case("torch", "connected", "collective")
def features_gathered_without_a_gradient():
    dist, net = one_process(), nn.Linear(8, 8)

    def loss():
        features = F.normalize(net(X), dim=-1)
        everyone = [torch.zeros_like(features)]
        dist.all_gather(everyone, features)  # here
        return F.cross_entropy(torch.cat(everyone) @ torch.cat(everyone).T, torch.arange(16))

    return given(loss, net)


@case("torch", "connected", "partial cut")
def keys_gathered_without_a_gradient():
    dist, net = one_process(), nn.Linear(8, 8)

    def loss():
        features = F.normalize(net(X), dim=-1)
        everyone = [torch.zeros_like(features)]
        dist.all_gather(everyone, features)  # here
        return F.cross_entropy(features @ torch.cat(everyone).T / 0.2, torch.arange(16))

    return given(loss, net)


@case("torch")
def own_features_put_back_among_the_gathered():
    dist, net = one_process(), nn.Linear(8, 8)

    def loss():
        features = F.normalize(net(X), dim=-1)
        everyone = [torch.zeros_like(features)]
        dist.all_gather(everyone, features)
        everyone[0] = features
        return F.cross_entropy(features @ torch.cat(everyone).T / 0.2, torch.arange(16))

    return given(loss, net)


@case("torch", "connected", "collective in place")
def summed_over_processes_in_place():
    dist, net = one_process(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss():
        hidden = net[:2](X)
        dist.all_reduce(hidden)  # here
        return F.cross_entropy(net[2](hidden), Y)

    return given(loss, net)


@case("torch")
def loss_summed_over_processes_for_the_log():
    dist, net = one_process(), nn.Linear(8, 3)

    def loss():
        value = F.cross_entropy(net(X), Y)
        dist.all_reduce(value.detach().clone())
        return value

    return given(loss, net)


@case("torch", "refused", "is a DTensor")
def sharded_by_fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one_process()
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    return classified(net)
