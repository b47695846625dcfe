"""surgery/recalibrate.py and its hook."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from detectors import narrow_cfg, scenes
from mabn_d2 import update_mabn_stats
from mabn_d2.engine import Trainer
from mabn_d2.engine.hooks import RecalibrateMABN
from mabn_d2.layers import CenConv2d, MABN2d, PerLevelNorm
from mabn_d2.modeling.norm import build_model


class Small(nn.Module):
    """A residual chain, one norm used twice, one on the side, images of different sizes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(CenConv2d(3, 8, 3, padding=1), MABN2d(8), nn.ReLU())
        self.conv, self.norm = CenConv2d(8, 8, 3, padding=1), MABN2d(8, activation="relu")
        self.shared = nn.Sequential(CenConv2d(8, 8, 1), MABN2d(8))
        self.last = nn.Sequential(CenConv2d(8, 4, 3), MABN2d(4))
        self.unused = MABN2d(3)

    def forward(self, images):
        x = self.stem(images)
        x = x + self.norm(self.conv(x))
        return self.last(self.shared(x) + self.shared(-x[:, :, ::2, ::2]).mean())


def variances(model):
    return [m.running_var.clone() for m in model.modules() if isinstance(m, MABN2d)]


@torch.no_grad()
def test_every_layer_gets_the_second_moment_of_its_input():
    model, images = Small(), torch.randn(12, 3, 10, 14)
    update_mabn_stats(model, images.split(5), 3)
    x = nn.functional.conv2d(
        images,
        model.stem[0].weight - model.stem[0].weight.mean((1, 2, 3), True),
        model.stem[0].bias,
        padding=1,
    )
    torch.testing.assert_close(
        model.stem[1].running_var, x.double().square().mean((0, 2, 3)).float()
    )
    # Then the whole, in evaluation, has inputs of that moment: the values agree with one another.
    seen = {}
    for module in model.modules():
        if isinstance(module, MABN2d):
            module.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0]))
    model.eval()(images)
    assert [len(inputs) for inputs in seen.values()] == [1, 1, 2, 1]
    for norm, inputs in seen.items():
        x = torch.cat([i.transpose(0, 1).flatten(1) for i in inputs], 1)
        torch.testing.assert_close(norm.running_var, x.square().mean(1), rtol=1e-5, atol=0)
    assert torch.equal(model.unused.running_var, torch.ones(3))


SETS_STANCE = hasattr(torch.compiler, "set_stance")  # torch 2.6


@pytest.mark.parametrize("how", ["whole", "inside", "in place"] if SETS_STANCE else ["whole"])
def test_compiled_models(how):
    """Also one whose code was compiled before, in evaluation: it calls no hook that came later."""
    torch.compiler.reset()
    body = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), nn.ReLU(), CenConv2d(4, 4, 3), MABN2d(4))
    expected, images = copy.deepcopy(body), torch.randn(4, 3, 8, 8)
    update_mabn_stats(expected, images.split(2), 2)
    if how == "in place":
        body.compile(backend="aot_eager")
    model = body if how == "in place" else torch.compile(body, backend="aot_eager")
    model = nn.Sequential(model) if how == "inside" else model
    model.eval()(images[:2])
    update_mabn_stats(model, images.split(2), 2)
    for found, wanted in zip(variances(body), variances(expected), strict=True):
        assert torch.equal(found, wanted)


def _cut(sizes):
    """Return the indices of batches of these sizes."""
    return [part.tolist() for part in torch.arange(sum(sizes)).split(sizes)]


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [7, 5], [5, 7], [2, 3, 7]])
def test_the_batch_split_and_the_values_before_do_not_matter(sizes):
    model, images = Small(), torch.randn(12, 3, 10, 14)
    update_mabn_stats(model, images.split(6), 2)
    expected = variances(model)
    for norm in model.modules():
        if isinstance(norm, MABN2d) and norm is not model.unused:
            norm.running_var.uniform_(0.01, 100)
    state = [m.iters.clone() for m in model.modules() if isinstance(m, MABN2d)]
    batches = DataLoader(TensorDataset(images, torch.arange(12)), batch_sampler=_cut(sizes))
    update_mabn_stats(model, batches, len(sizes))
    torch.testing.assert_close(variances(model), expected, rtol=1e-5, atol=0)
    assert [m.iters for m in model.modules() if isinstance(m, MABN2d)] == state
    assert all(module.training for module in model.modules())


def test_what_is_left_alone_and_what_is_refused(caplog):
    model, images = Small(), torch.randn(4, 3, 10, 14)
    model.last[1].weight.requires_grad_(False)  # frozen
    update_mabn_stats(model, [images], 1)
    assert torch.equal(model.last[1].running_var, torch.ones(4))
    assert "no batch reaches unused" in caplog.text
    before = variances(model)
    with pytest.raises(ValueError, match="2 batches are to be read.*has 1"):
        update_mabn_stats(model, [images], 2)
    with pytest.raises(ValueError, match="at least 1"):
        update_mabn_stats(model, [images], 0)
    with pytest.raises(ValueError, match="no MABN layer"):
        update_mabn_stats(nn.Conv2d(3, 4, 1), [images], 1)
    model.conv.weight.data[0] = torch.inf
    with pytest.raises(FloatingPointError, match="reaches norm "):
        update_mabn_stats(model, [images * 2], 1)
    assert all(map(torch.equal, variances(model), before))


def test_detector_in_evaluation():
    """Each image's instances depend on it alone, so the split does not matter here either."""
    torch.manual_seed(1)
    model, images = build_model(narrow_cfg()).eval(), scenes(4)
    update_mabn_stats(model, [images], 1)
    expected = variances(model)
    assert all((v != 1).all() for v in expected)
    update_mabn_stats(model, [images[:1], images[1:]], 2)
    torch.testing.assert_close(variances(model), expected, rtol=1e-4, atol=0)


def test_hook(digits_cfg):
    digits_cfg.DATASETS.TEST = ()
    digits_cfg.TEST.PRECISE_BN.ENABLED, digits_cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    digits_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(digits_cfg)
    (hook,) = [h for h in trainer._hooks if isinstance(h, RecalibrateMABN)]
    trainer.train()
    saved = torch.load(f"{digits_cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)["model"]
    stem = "backbone.bottom_up.stem.conv1.norm.running_var"
    assert torch.equal(saved[stem], trainer.model.state_dict()[stem])  # before the checkpoint
    # The stem's is exact: that of the first two batches at the final weights.
    conv = trainer.model.backbone.bottom_up.stem.conv1
    total = count = 0
    for _, batch in zip(range(2), hook.data_loader):
        x = trainer.model.preprocess_image(batch).tensor
        with torch.no_grad():
            x = conv._conv_forward(x, conv.weight - conv.weight.mean((1, 2, 3), True), None)
        total, count = total + x.square().sum((0, 2, 3)), count + x[:, 0].numel()
    torch.testing.assert_close(conv.norm.running_var, total / count, rtol=1e-4, atol=0)
    assert all(not torch.equal(v, torch.ones_like(v)) for v in variances(trainer.model))


def test_a_norm_that_the_hook_leaves_alone_is_said(digits_cfg, caplog):
    for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        digits_cfg.MODEL[node].NORM = "BRN"
    digits_cfg.TEST.PRECISE_BN.ENABLED = True
    Trainer(digits_cfg)
    assert "TEST.PRECISE_BN.ENABLED is True, but the model has no MABN or BatchNorm" in caplog.text


class Averaging(nn.Module):
    """Moves an average and a BatchNorm in each training forward, as RetinaNet does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = CenConv2d(3, 4, 3), MABN2d(4)
        self.other, self.loss_normalizer = nn.BatchNorm2d(4), 100.0

    def forward(self, images):
        self.loss_normalizer *= 0.9
        return self.other(self.norm(self.conv(images)))


def test_the_hook_moves_running_var_only():
    model = Averaging()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = RecalibrateMABN(1, model, [torch.randn(2, 3, 8, 8)], 1)
    hook.trainer = SimpleNamespace(iter=0, max_iter=1)
    hook.after_step()
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert changed == ["norm.running_var"] and model.loss_normalizer == 100 and model.training


class Levels(nn.Module):
    """A head as RetinaNet's: each norm is used once for each level, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(CenConv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(PerLevelNorm(MABN2d(3), 3) for _ in range(2))

    def forward(self, levels):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            levels = [norm(conv(x)) for x in levels]
        return levels


@torch.no_grad()
def test_each_level_gets_its_own():
    model = Levels()
    batches = [[torch.randn(2, 3, 16 // 2**i, 16 // 2**i) * 10**i for i in range(3)]] * 2
    update_mabn_stats(model, batches, 2)
    levels = batches[0]
    for conv, norm in zip(model.convs, model.norms, strict=True):
        assert norm._level == 0
        levels = [conv(x) for x in levels]
        for x, layer in zip(levels, norm, strict=True):
            torch.testing.assert_close(
                layer.running_var, x.square().mean((0, 2, 3)), rtol=1e-4, atol=0
            )
        levels = [layer.eval()(x) for x, layer in zip(levels, norm, strict=True)]


class ImageByImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), CenConv2d(4, 4, 3), MABN2d(4))

    def forward(self, images):
        return [self.body(image[None]) for image in images]


@pytest.mark.parametrize("sizes", [[6], [1, 5], [5, 1], [2, 1, 3]])
def test_batches_that_use_a_layer_more_or_less_often(sizes):
    model = ImageByImage()
    images = torch.randn(6, 3, 8, 8) * torch.arange(1, 7)[:, None, None, None]
    update_mabn_stats(model, [images], 1)
    expected = variances(model)
    update_mabn_stats(model, images.split(sizes), len(sizes))
    torch.testing.assert_close(variances(model), expected, rtol=1e-5, atol=0)
