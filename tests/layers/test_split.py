"""The classification form: groups of an input as normalization batches."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils.checkpoint import checkpoint

from mabn_d2.layers import MABN2d
from mabn_d2.layers.functional_split import group_mean, to_images
from reference import FORMATS, TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("operators")

SMALL = {"batch_size": 2, "simulated_batch_size": 8, "warmup_iters": 3, "split_batch": True}


def make_layer(channels=3, **arguments):
    layer = MABN2d(channels, **{"dtype": torch.float64, **SMALL, **arguments})
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
        layer.bias.copy_(torch.linspace(-0.2, 0.2, channels))
    return layer


class Reference:
    """The formulas group by group, lists for windows."""

    def __init__(self, layer):
        self.layer, self.t, self.past_x, self.past_g = layer, 0, [], []
        self.running_var = torch.ones(layer.num_features, dtype=torch.float64)

    def trailing(self, past, value):
        """Mean of the last m values, `value` the latest of them."""
        past.append(value)
        return value if self.t == 1 else sum(past[-self.layer.window :]) / self.layer.window

    def step(self, x, dy):
        """Return y, dx, dweight, dbias of one iteration."""
        layer, eps = self.layer, self.layer.eps
        weight, bias = layer.weight.detach()[:, None, None], layer.bias.detach()[:, None, None]
        self.t += 1
        ys, dxs, dweight, dbias, vs = [], [], 0, 0, []
        groups = list(zip(x.double().split(layer.batch_size), dy.double().split(layer.batch_size)))
        for group, _ in groups:
            vs.append(self.trailing(self.past_x, group.square().mean((0, 2, 3))))
        mean_v = sum(vs) / len(vs)
        before = mean_v if self.t == 1 else self.running_var
        for v, (group, dgroup) in zip(vs, groups):
            r = torch.ones_like(v)
            if self.t >= layer.warmup_iters:
                r = ((v + eps) / (before + eps)).sqrt().clamp(1 / 5, 5)
            r, std = r[:, None, None], (v + eps).sqrt()[:, None, None]
            z, g = group / std, dgroup * weight * r
            psi = self.trailing(self.past_g, (g * z).mean((0, 2, 3)))
            ys.append(weight * r * z + bias)
            dxs.append((g - z * psi[:, None, None]) / std)
            dweight = dweight + (dgroup * r * z).sum((0, 2, 3))
            dbias = dbias + dgroup.sum((0, 2, 3))
        self.running_var = layer.momentum * before + (1 - layer.momentum) * mean_v
        if self.t == 1:  # fewer groups than the window: repeated until it is full
            for past in (self.past_x, self.past_g):
                past[:] = (past * layer.window)[-layer.window :]
        return torch.cat(ys), torch.cat(dxs), dweight, dbias


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sizes", [[8] * 6, [7] * 6, [3] * 9, [1] * 9, [5, 12, 1, 2, 9, 4]], ids=str
)
def test_equals_formula_whatever_the_number_of_images(device, sizes, dtype, memory_format):
    layer = make_layer(dtype=torch.promote_types(dtype, torch.float32))
    reference = Reference(copy.deepcopy(layer))
    layer.to(device)
    for t, n in enumerate(sizes):
        x, dy = (1 + t % 3) * torch.randn(n, 3, 4, 5), torch.randn(n, 3, 4, 5)
        x, dy = x.to(dtype), dy.to(dtype)
        inputs = x.to(device, copy=True).contiguous(memory_format=memory_format).requires_grad_()
        layer.zero_grad()
        y = layer(inputs)
        y.backward(dy.to(device))
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        actual = (y, inputs.grad, layer.weight.grad, layer.bias.grad)
        for value, expected in zip(actual, reference.step(x, dy)):
            assert_close(value, expected, dtype, factor=4)
        assert_close(layer.running_var, reference.running_var, dtype, factor=2)
        assert_close(layer.state_dict()["pre_x2"], torch.stack(reference.past_x[-4:]), dtype, 4)


def test_one_group_an_iteration_moves_as_the_ordinary_form(device):
    """With N = B and full windows both forms are the same, but for which iterations are plain."""
    split = make_layer(warmup_iters=0).to(device)
    plain = make_layer(warmup_iters=0, clip_start=0, split_batch=False).to(device)
    for t in range(14):
        x, dy = (torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device) for _ in range(2))
        results = []
        for layer in (split, plain):
            inputs = x.clone().requires_grad_()
            y = layer(inputs)
            y.backward(dy)
            results.append((y, inputs.grad))
        plain.running_var.copy_(split.running_var)  # which starts differently
        if t > 9:  # both windows hold the last 4 iterations
            for a, b in zip(*results):
                assert_close(a, b)


def test_group_mean_of_a_short_last_group():
    rows = torch.tensor([[1.0], [3.0], [5.0], [7.0], [20.0]])
    assert group_mean(rows, 2).tolist() == [[2], [6], [20]]
    assert to_images(group_mean(rows, 2), 2, 5).tolist() == [[2], [2], [6], [6], [20]]


def test_evaluation_and_empty_input_are_those_of_the_ordinary_form(device):
    split, plain = make_layer().to(device), make_layer(split_batch=False).to(device)
    for layer in (split, plain):
        layer.running_var.copy_(torch.tensor([0.5, 1, 2]))
    x = torch.randn(5, 3, 4, 5, dtype=torch.float64, device=device)
    assert torch.equal(split.eval()(x), plain.eval()(x))
    split.train()
    assert split(x[:0]).shape == (0, 3, 4, 5) and split.iters == 0


def test_repeated_forward_counts_once(device):
    a, b = (make_layer().to(device) for _ in range(2))
    for n in (4, 7, 4):
        x = torch.randn(n, 3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
        copied = x.detach().clone().requires_grad_()
        a(x).pow(3).sum().backward()
        checkpoint(b, copied, use_reentrant=n == 7).pow(3).sum().backward()
        assert torch.equal(x.grad, copied.grad)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_relu_in_place_behind_it(device, memory_format):
    gradients = []
    for relu in (torch.relu, torch.relu_):
        x = torch.linspace(-1, 2, 240, dtype=torch.float64, device=device).view(4, 3, 4, 5)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        relu(make_layer().to(device)(x)).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_infinite_input_moves_no_window(device):
    layer = make_layer().to(device)
    x = torch.randn(4, 3, 4, 5, dtype=torch.float64, device=device)
    layer(x).sum().backward()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.zero_grad()
    layer(torch.where(x > 1, torch.inf, x)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.rejected == 1


def test_state_has_the_published_keys_and_shapes():
    """A published classifier's state loads; a run goes on from its own state as if uninterrupted."""
    layer = make_layer()
    published = {k: torch.rand(4, 3, dtype=torch.float64) for k in ("pre_x2", "pre_gz")}
    published |= {k: torch.rand(1, 3, 1, 1) for k in ("weight", "bias", "running_var")}
    published |= {"sta_matrix": torch.rand(4, 8), "iters": torch.tensor([300])}
    layer.load_state_dict(published)
    state = layer.state_dict()
    assert state.keys() == published.keys() - {"sta_matrix"}
    assert all(
        torch.equal(v.flatten().double(), published[k].flatten().double()) for k, v in state.items()
    )
    twin = make_layer()
    twin.load_state_dict(copy.deepcopy(state))
    x = torch.randn(8, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))


def test_distributed_checkpoints():
    """torch.distributed.checkpoint finds a tensor by each key of the state dict."""
    layer, other = make_layer(), make_layer()
    layer(torch.randn(6, 3, 5, 4, requires_grad=True)).sin().sum().backward()
    set_model_state_dict(other, get_model_state_dict(layer))
    for value, wanted in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
        assert torch.equal(value, wanted)


def test_windows_of_another_form_or_length_start_empty(caplog):
    split, plain = make_layer(), make_layer(split_batch=False)
    x = torch.randn(8, 3, 4, 5, dtype=torch.float64)
    for layer in (split, plain):
        layer(x).sum().backward()
    for source, target in (
        (plain, make_layer()),
        (split, make_layer(split_batch=False)),
        (split, make_layer(simulated_batch_size=4)),
    ):
        target.load_state_dict(source.state_dict())
        assert target.iters == 0 and not target.buffer_x2.any() and not target.buffer_gz.any()
        assert torch.equal(target.running_var, source.running_var)
        assert "the windows start empty" in caplog.text
        caplog.clear()


def test_second_backward_is_refused(operators):
    """It would count the statistics of the groups twice; the ordinary form writes the same slot again."""
    for split_batch in (True, False):
        layer = MABN2d(3, simulated_batch_size=8, warmup_iters=0, split_batch=split_batch)
        for _ in range(6):
            layer(torch.randn(4, 3, 4, 4)).sin().sum().backward()
        x = torch.randn(4, 3, 4, 4, requires_grad=True)
        loss = layer(x).sin().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        if split_batch:
            with pytest.raises(RuntimeError, match="call backward once, of the sum of the losses"):
                loss.backward()
        else:
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], first)
