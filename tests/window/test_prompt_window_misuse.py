"""Every misuse of a prompt window is refused in a sentence."""

import pytest
import torch
from torch import nn
from window_table import Table

from qwen_fused.window.prompt_window import PromptWindow


class TestMisuse:
    """Every way to lose or falsify the gradient is refused."""

    def test_flushing_twice(self):
        window = PromptWindow(Table())
        with pytest.raises(RuntimeError, match="nothing to flush"):
            window.flush()
        window.prompts([0]).sum().backward()
        window.flush()
        with pytest.raises(RuntimeError, match="nothing to flush"):
            window.flush()

    def test_a_batch_more_than_the_window_holds(self):
        window = PromptWindow(Table(), 1)
        window.prompts([0]).sum().backward()
        with pytest.raises(RuntimeError, match="had its 1 batches: call flush"):
            window.prompts([1])

    @pytest.mark.parametrize("mode", ["recompute", "retain"])
    @pytest.mark.parametrize("then", ["prompts", "flush"])
    # torch's fused step writes without counting it as a write
    @pytest.mark.parametrize("how", [dict(fused=True), dict(foreach=True), dict(foreach=False)])
    def test_stepping_without_a_flush(self, mode, then, how):
        encode = Table()
        window = PromptWindow(encode, 3, mode=mode)
        window.prompts([0]).sum().backward()
        encode.weight.grad = torch.ones_like(encode.weight)
        torch.optim.AdamW([encode.weight], lr=1e-6, **how).step()
        with pytest.raises(RuntimeError, match="changed inside the window: call flush"):
            window.prompts([0]) if then == "prompts" else window.flush()

    def test_weights_replaced_behind_autograds_back(self):
        encode = Table()
        window = PromptWindow(encode, 3)
        window.prompts([0]).sum().backward()
        encode.weight.data = encode.weight.data.clone()
        with pytest.raises(RuntimeError, match="changed inside the window"):
            window.prompts([0])

    def test_stepping_others_inside_and_encode_after_a_flush_is_right(self):
        encode, head = Table(), nn.Linear(4, 1)
        window = PromptWindow(encode, 2)
        # one optimizer for all, as a trainer may have it: what has no gradient stands still
        optimizer = torch.optim.AdamW([encode.weight, *head.parameters()], lr=0.1, fused=True)
        before = encode.weight.detach().clone()
        for _ in range(6):
            head(window.prompts([0])).sum().backward()
            if window.full:
                window.flush()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(encode.weight, before)

    @pytest.mark.parametrize("leave", [PromptWindow.flush, PromptWindow.discard])
    def test_a_prompt_after_its_window(self, leave):
        window = PromptWindow(Table())
        prompts = window.prompts([0])
        prompts.sum().backward()
        leave(window)
        with pytest.raises(RuntimeError, match="whose window is over"):
            prompts.sum().backward()
        window.prompts([0]).sum().backward()

    def test_a_loss_that_never_met_the_prompts(self):
        window = PromptWindow(Table())
        window.prompts([0]).detach().sum()
        with pytest.raises(RuntimeError, match="no gradient has reached"):
            window.flush()

    def test_another_mode_or_other_data_at_the_second_pass(self):
        encode = Table()
        window = PromptWindow(encode)
        window.prompts([0, 1]).sum().backward()
        encode.eval()
        with pytest.raises(RuntimeError, match="other prompts than it handed out"):
            window.flush()
        assert encode.weight.grad is None

    @pytest.mark.parametrize("mode", ["recompute", "retain"])
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
    def test_a_flush_that_stops_half_way(self, mode, error):
        encode, fail = Table().eval(), [True]

        def stop(gradient):
            if fail[0]:
                raise error("no more memory")

        def failing(keys):
            out = encode(keys)
            if 2 in keys and out.requires_grad:
                out.register_hook(stop)
            return out

        window = PromptWindow(failing, 2, mode=mode)
        window.prompts([0, 1]).sum().backward()
        window.prompts([2]).sum().backward()
        with pytest.raises(error):
            window.flush()
        assert encode.weight.grad is not None
        fail[0] = False
        for call in (window.flush, window.state_dict, lambda: window.prompts([0])):
            with pytest.raises(
                RuntimeError, match=r"stopped half way, .* set their gradients to None and call discard"
            ):
                call()
        # the way on
        encode.weight.grad = None
        window.discard()
        window.prompts([2]).sum().backward()
        assert window.flush() == 1
        want = torch.zeros_like(encode.weight)
        want[2] = 2 * encode.weight.detach()[2]
        torch.testing.assert_close(encode.weight.grad, want)

    def test_a_flush_that_stops_before_it_sends_can_be_called_again(self):
        encode, fail = Table().eval(), [False]

        def failing(keys):
            if fail[0]:
                raise torch.OutOfMemoryError("no more memory")
            return encode(keys)

        window = PromptWindow(failing, 1)
        window.prompts([0, 1]).sum().backward()
        fail[0] = True
        with pytest.raises(torch.OutOfMemoryError):
            window.flush()
        fail[0] = False
        assert window.flush() == 2
        torch.testing.assert_close(encode.weight.grad[:2], 2 * encode.weight.detach()[:2])

    def test_an_encode_that_cuts_the_gradient(self):
        encode = Table()
        for mode in ("recompute", "retain"):
            with pytest.raises(ValueError, match="does not require grad"):
                PromptWindow(lambda keys: encode(keys).detach(), mode=mode).prompts([0])

    @pytest.mark.parametrize("shape", [(3, 3, 4), (3, 4), (2,), ()])
    def test_an_encode_of_another_shape(self, shape):
        window = PromptWindow(lambda keys: torch.ones(shape, requires_grad=True))
        with pytest.raises(ValueError, match=r"encode must return \[2, D\] or \[2, K, D\] for 2 keys"):
            window.prompts([0, 1])

    @pytest.mark.parametrize(
        "wrap", [lambda z: (z,), lambda z: {"prompts": z}, lambda z: None], ids=["tuple", "dict", "None"]
    )
    def test_an_encode_that_returns_no_tensor(self, wrap):
        encode = Table()
        window = PromptWindow(lambda keys: wrap(encode(keys)))
        with pytest.raises(
            ValueError, match=r"encode must return \[1, D\] or \[1, K, D\] for 1 keys, got a (tup|dict|None)"
        ):
            window.prompts([0])

    @pytest.mark.parametrize("how", ["train", "retain", "eval", "no statistics"])
    def test_statistics_that_would_be_counted_twice(self, how):
        rows, norm = torch.linspace(-1, 1, 12).view(3, 4), nn.BatchNorm1d(4, track_running_stats=how != "no statistics")
        norm.train(how != "eval")
        window = PromptWindow(lambda keys: norm(rows[keys]), 1, mode="retain" if how == "retain" else "recompute")
        if how == "train":
            with pytest.raises(ValueError, match="encode must change nothing where it runs twice, got batch norm"):
                window.prompts([0, 2])
            return
        window.prompts([0, 2]).sum().backward()
        window.flush()
        assert norm.num_batches_tracked is None or norm.num_batches_tracked == int(how == "retain")

    def test_an_encode_of_another_width_later(self):
        encode = Table().eval()
        window = PromptWindow(lambda keys: encode(keys)[:, : 2 if 3 in keys else 4], 2)
        window.prompts([0]).sum().backward()
        with pytest.raises(ValueError, match=r"prompts of one shape inside a window, got \(4,\), then \(2,\)"):
            window.prompts([3])
        # the batch that failed is in nobody's way
        window.prompts([1]).sum().backward()
        assert window.flush() == 2
        torch.testing.assert_close(encode.weight.grad[:2], 2 * encode.weight.detach()[:2])

    @pytest.mark.parametrize("mode", ["recompute", "retain"])
    def test_an_encode_that_is_frozen_later(self, mode):
        encode = Table().eval()
        window = PromptWindow(encode, 1, mode=mode)
        window.prompts([0]).sum().backward()
        window.flush()
        encode.requires_grad_(False)
        window.prompts([0]).sum().backward()
        with pytest.raises(RuntimeError, match="encode gives prompts that require no grad"):
            window.flush()
        encode.requires_grad_(True)
        encode.weight.grad = None
        # nothing was sent: it can be called again
        window.flush()
        torch.testing.assert_close(encode.weight.grad[0], 2 * encode.weight.detach()[0])

    @pytest.mark.parametrize("mode", ["recompute", "retain"])
    @pytest.mark.parametrize("how", ["unfrozen", "replaced"])
    def test_a_layer_that_trains_since_the_last_window(self, mode, how):
        table, head = nn.Embedding(4, 3), nn.Linear(3, 2)
        encode = nn.Sequential(table.requires_grad_(how == "replaced"), head)
        window = PromptWindow(lambda keys: encode(torch.tensor(keys)), 2, mode=mode)
        window.prompts([0]).sum().backward()
        window.flush()
        encode[0] = table.requires_grad_() if how == "unfrozen" else nn.Embedding(4, 3)
        window.prompts([0]).sum().backward()
        with torch.no_grad():
            encode[0].weight.mul_(1.1)
        with pytest.raises(RuntimeError, match="changed inside the window"):
            window.prompts([1]).sum().backward()
            window.flush()

    def test_a_flush_under_inference_mode_can_be_called_again(self):
        encode = Table().eval()
        window = PromptWindow(encode, 2)
        window.prompts([0]).sum().backward()
        with torch.inference_mode(), pytest.raises(RuntimeError, match="flush.. is under inference_mode"):
            window.flush()
        window.flush()
        torch.testing.assert_close(encode.weight.grad[0], 2 * encode.weight.detach()[0])

    @pytest.mark.parametrize("scale", [torch.ones(4), torch.ones(2, 1), torch.tensor(1j), "1", None, 1j])
    def test_a_scale_that_is_no_number(self, scale):
        encode = Table().eval()
        window = PromptWindow(encode, 1)
        window.prompts([0, 1]).sum().backward()
        with pytest.raises(ValueError, match="scale must be a number or a tensor of one element"):
            window.flush(scale)
        window.flush(torch.tensor([0.5]))
        torch.testing.assert_close(encode.weight.grad[:2], encode.weight.detach()[:2])

    @pytest.mark.parametrize("keys", ["01", b"01", {0, 1}, iter([0, 1]), 3])
    def test_keys_that_are_no_list(self, keys):
        with pytest.raises(ValueError, match="keys must be a list of keys, got a "):
            PromptWindow(Table()).prompts(keys)

    def test_a_state_that_is_not_whole(self):
        window = PromptWindow(Table())
        state = window.state_dict()
        del state["gradient"]
        with pytest.raises(ValueError, match="state must be what a window's state_dict gave, got one without gradient"):
            window.load_state_dict(state)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(dict(size=0), "size must be .* of at least 1, got 0"), (dict(mode="keep"), "recompute, retain, got 'keep'")],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PromptWindow(Table(), **arguments)

    def test_no_keys(self):
        with pytest.raises(ValueError, match="at least one key"):
            PromptWindow(Table()).prompts([])


@pytest.mark.parametrize("keys", [torch.tensor([1, 1]), [torch.tensor(1)], [[1]]], ids=["tensor", "scalar", "list"])
def test_keys_that_mean_nothing_the_next_time_are_refused(keys):
    """Two tensors of one value are two keys to a dictionary."""
    with pytest.raises(ValueError, match="keys must be hashable and equal where they mean the same.*got a (Tens|list)"):
        PromptWindow(Table(), 3).prompts(keys)
