"""Pairs of convolution and norm follow what the model does, not the order of registration."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detectors import randomized
from mabn_d2 import MABN2d, convert_mabn, fold_mabn
from mabn_d2.layers import CenConv2d


class OtherOrder(nn.Module):
    """Registers its parts in another order than it runs them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn1 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Between(nn.Module):
    """A convolution, something else, a norm, and perhaps a data-dependent branch around them."""

    def __init__(self, between=None, skip=False, traceable=True):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.between, self.skip, self.traceable = between or unchanged, skip, traceable

    def forward(self, x):
        if not self.traceable and x.mean() > 1e6:
            return x
        x = self.conv(x)
        y = self.out(self.bn(self.between(x)).relu())
        return y + x if self.skip else y


def changed_in_place(x):
    x.relu_()
    return x


def unchanged(x):
    return x


WRONG = {
    "relu": torch.relu,
    "in place": changed_in_place,
    "sum": lambda x: x + x.flip(0),
    "concatenation": lambda x: torch.cat([x[:, :4], x[:, 4:].abs()], 1),
    "pooling": lambda x: nn.functional.max_pool2d(x, 2),
}
SAME = {"itself": unchanged, "alias": lambda x: x.view_as(x), "layout": torch.clone}


def images():
    return torch.randn(4, 3, 12, 12)


def assert_folds(model, **kwargs):
    model = randomized(model)
    x = images()
    for into in ("frozen_bn", "batch_norm", "conv"):
        found = fold_mabn(model, into, **kwargs)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_another_order_of_registration():
    assert_folds(convert_mabn(OtherOrder()))
    model = convert_mabn(OtherOrder(), example_inputs=images())
    assert_folds(model)
    model.train()(images())


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("how", ["trace", "data", "first forward"])
def test_something_between(kind, how):
    model = Between(WRONG[kind], traceable=how == "trace")
    if how == "first forward":
        convert_mabn(model).eval()(images())  # evaluation checks nothing
        with pytest.raises(ValueError, match="the input of bn is not the output of conv"):
            model.train()(images())
        return
    inputs = {"example_inputs": images()} if how == "data" else {}
    with pytest.raises(ValueError, match="bn: its input is (not )?the output of a convolution"):
        convert_mabn(model, **inputs)
    assert type(model.conv) is nn.Conv2d and type(model.bn) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("how", ["data", "first forward"])
def test_what_passes(kind, how):
    model = Between(SAME[kind], traceable=False)
    convert_mabn(model, **({"example_inputs": images()} if how == "data" else {}))
    hooks = how == "first forward"
    assert len(model.conv._forward_hooks) == len(model.bn._forward_pre_hooks) == hooks
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))) if kind == "itself" else model
    for _ in range(2):
        model(images())
    assert not model.conv._forward_hooks and not model.bn._forward_pre_hooks
    with pytest.raises(ValueError, match=r"bn: it is not certain .*conv .*give example_inputs"):
        fold_mabn(model, "conv")
    if kind == "itself":
        assert_folds(model, example_inputs=images())


@pytest.mark.parametrize("traceable", [True, False])
def test_another_user_of_the_output(traceable):
    model = randomized(convert_mabn(Between(skip=True, traceable=traceable), images()))
    x = images()
    torch.testing.assert_close(fold_mabn(model)(x), model(x), rtol=1e-5, atol=1e-6)
    inputs = {} if traceable else {"example_inputs": (x,)}
    with pytest.raises(ValueError, match="bn: something else uses the output of conv"):
        fold_mabn(model, "conv", **inputs)


def test_input_of_a_block_is_another_modules_business():
    """conv -> Sequential(norm, ReLU): only data shows the pair."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    with pytest.raises(ValueError, match="1.0: nothing stands in front of it"):
        convert_mabn(net)
    assert_folds(convert_mabn(net, images()), example_inputs=images())


@pytest.mark.parametrize("nested", [False, True])
def test_parts_of_a_sequence_that_are_taken_one_by_one(nested):
    class Net(nn.Module):
        def __init__(self, between=None, skip=False):
            super().__init__()
            self.seq = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.seq = nn.Sequential(self.seq) if nested else self.seq
            self.between, self.skip = between or unchanged, skip

        def forward(self, x):
            conv, norm = self.seq[0] if nested else self.seq
            x = conv(x)
            y = norm(self.between(x))
            return y + x if self.skip else y

    assert_folds(convert_mabn(Net()))
    with pytest.raises(ValueError, match=r"1: its input is not the output.*behind seq.*0"):
        convert_mabn(Net(torch.relu))
    with pytest.raises(ValueError, match=r"1: something else uses the output of seq.*0"):
        fold_mabn(convert_mabn(Net(skip=True)), "conv")


def test_a_norm_attached_to_a_convolution_that_does_not_run_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.conv.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.conv.norm(self.conv(x).relu())

    with pytest.raises(ValueError, match="conv.norm: its input is not the output"):
        convert_mabn(Net(), images())
    model = convert_mabn(Net())
    with pytest.raises(ValueError, match="input of conv.norm is not the output of conv"):
        model(images())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_check_without_gradients(mode):
    model = convert_mabn(OtherOrder())
    with mode():
        model(images())
    assert not model.bn1._forward_pre_hooks


def test_shared_norms_and_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.conv2, self.same = nn.Conv2d(3, 8, 3), self.norm
            self.plain_list = [self.norm]

        def forward(self, x):
            return self.norm(self.conv1(x)) + self.plain_list[0](self.conv2(x))

    model = convert_mabn(Net())
    assert model.norm is model.same is model.plain_list[0] and type(model.norm) is MABN2d
    assert type(model.conv1) is type(model.conv2) is CenConv2d
    model(images())
    assert model.norm.iters == 2 and not model.norm._forward_pre_hooks
    assert_folds(model)

    class Levels(nn.Module):
        """One convolution, a norm for each level."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn1(self.conv(x)).mean() + self.bn2(self.conv(x[..., ::2, ::2])).mean()

    model = convert_mabn(Levels())
    model(images())
    assert not model.bn2._forward_pre_hooks
    torch.testing.assert_close(fold_mabn(model.eval())(x := images()), model(x))
    with pytest.raises(ValueError, match="bn1: something else uses the output of conv"):
        fold_mabn(model, "conv")


def test_weights_that_several_convolutions_share():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    other = nn.Conv2d(3, 8, 3)
    other.weight = net[0].weight
    model = randomized(convert_mabn(nn.ModuleDict({"net": net, "other": other})))
    x = images()
    for into in ("frozen_bn", "conv"):
        folded = fold_mabn(model, into)
        torch.testing.assert_close(folded["net"](x), model["net"](x), rtol=1e-4, atol=1e-5)
        assert torch.equal(folded["other"](x), model["other"](x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_check_under_activation_checkpointing(reentrant):
    class Net(Between):
        def forward(self, x):
            x = checkpoint(super().forward, x, use_reentrant=reentrant)
            return x.mean()

    for between in (unchanged, torch.relu):
        model = convert_mabn(Net(between, traceable=False))
        x = images().requires_grad_()
        if between is torch.relu:
            with pytest.raises(ValueError, match="the input of bn is not"):
                model(x)
            continue
        for _ in range(2):
            model(x).backward()
        assert model.bn.iters == 2 and not model.bn._forward_pre_hooks


def test_check_under_compile():
    torch.compiler.reset()
    model = convert_mabn(OtherOrder())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    compiled(x).sum().backward()
    assert model.bn1.iters == 1 and model.conv1.weight.grad.any()
    assert model.bn1._forward_pre_hooks
    model(x)  # a forward without the compiler removes the hook
    assert not model.bn1._forward_pre_hooks
    wrong = convert_mabn(Between(traceable=True))
    wrong.between = torch.relu  # the trace saw another forward
    with pytest.raises(ValueError, match="the input of bn is not the output of conv"):
        torch.compile(wrong, backend="aot_eager")(x)


def test_check_under_ddp(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for between in (unchanged, torch.relu):
            model = convert_mabn(Between(between, traceable=False))
            ddp = nn.parallel.DistributedDataParallel(model)
            if between is torch.relu:
                with pytest.raises(ValueError, match="the input of bn is not"):
                    ddp(images())
                continue
            for _ in range(2):
                ddp(images()).sum().backward()
            assert model.bn.iters == 2 and not model.bn._forward_pre_hooks
    finally:
        torch.distributed.destroy_process_group()


def test_check_of_user_hooks_and_train_flags():
    """Hooks of the user's stay; a norm in evaluation mode is not checked, and keeps no output."""
    calls = []
    model = Between(traceable=False)
    model.bn.register_forward_hook(lambda *args: calls.append(1))
    convert_mabn(model)
    model.bn.eval()
    model(images())
    (hook,) = model.bn._forward_pre_hooks.values()
    assert calls == [1] and hook.check.outputs == []
    model.bn.train()
    model(images())
    assert calls == [1, 1] and not model.bn._forward_pre_hooks


class BeforeTheNorm(nn.Module):
    """Something between convolution and norm that some inputs or first weights hide."""

    def __init__(self, what):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.zeros(()))
        self.what = what

    def forward(self, x):
        y = self.conv(x)
        y = torch.relu(y) if self.what == "relu" else y + self.scale * x
        return self.norm(y)


@pytest.mark.parametrize("what", ["relu", "ReZero"])
@pytest.mark.parametrize(
    "inputs", [torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), torch.randn(1, 4, 8, 8)]
)
def test_example_inputs_that_hide_something(what, inputs):
    """Zeros pass a ReLU, and a branch with a factor of zero adds nothing at first."""
    model = BeforeTheNorm(what)
    with pytest.raises(ValueError, match="norm"):
        convert_mabn(model, example_inputs=inputs)
    assert model.scale.item() == 0 and isinstance(model.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models(inside):
    """Converted and folded in place behind torch.compile."""
    parts = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = torch.compile(parts, backend="eager")
    model = nn.Sequential(model) if inside else model
    model = convert_mabn(model, simulated_batch_size=4)
    assert isinstance(parts[1], MABN2d) and list(parts._modules) == ["0", "1", "2"]
    x = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        model(x).sum().backward()
    wanted = parts.eval()(x)
    folded = fold_mabn(model, "conv")
    torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-5)
