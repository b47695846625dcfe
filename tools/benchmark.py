#!/usr/bin/env python3
"""Time normalization layers against BatchNorm: alone, in a ResNet-50 at inference, in a detector at
inference and in training.

    tools/benchmark.py layer --dtype fp32,bf16 --threads 1,2 --output benchmarks/layer.json
    tools/benchmark.py layer --norms mabn_split,bn_split --shapes 32x64x56x56 --baseline mabn
    tools/benchmark.py layer --device cuda --dtype fp32,fp16,bf16 --formats nchw,nhwc --shapes r50_fpn
    tools/benchmark.py inference --norms bn,ln,in,gn,mabn --output benchmarks/inference.json
    tools/benchmark.py detector --norms frozen_bn,mabn,mabn_folded --output benchmarks/detector.json
    tools/benchmark.py step --norms bn,mabn --output benchmarks/step.json

Norms are timed in turn, round by round; ratios are of the same round, to BatchNorm, with ReLU to
BatchNorm and ReLU, of a detector at inference to Detectron2's with FrozenBN, or to --baseline. Median
and quartiles are shown. `formula` is MABN by plain tensor expressions, `_split` the classification form
with normalization batches of 2 images, `mabn_folded` the model that `fold_mabn` makes of one with MABN,
`mabn_folded_conv` the one without norms. `copy` is Tensor.copy_ of one activation: `of copy` says which
share of its bandwidth a layer reaches, if the layer reads and writes activations 8 times, as two passes
each way do (x; x, y; dy, x; dy, x, dx). Beside the JSON file a picture of the same name is written.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate
from torch import nn

from mabn_d2.benchmark import measure
from mabn_d2.layers import BatchRenorm2d, MABN2d, SplitBatchNorm2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


OBJECTS = 128  # in an image of `step`: the most that Detectron2's heads take
PASSES = 8  # of a layer over activations, forward and backward; a copy makes 2

# What the norms of Mask R-CNN R50-FPN see of 2 images of 800x1333, padded to 800x1344: stem, res2 to
# res5, FPN, box head (512 proposals an image), mask head (a quarter of them).
R50_FPN = [
    (2, 64, 400, 672), (2, 64, 200, 336), (2, 256, 200, 336), (2, 128, 100, 168), (2, 512, 100, 168),
    (2, 256, 50, 84), (2, 1024, 50, 84), (2, 512, 25, 42), (2, 2048, 25, 42), (2, 256, 100, 168),
    (2, 256, 25, 42), (1024, 256, 7, 7), (256, 256, 14, 14),
]  # fmt: skip


def baseline(norm, what, chosen=None):
    """Return the norm that a norm is compared with."""
    if chosen:
        return chosen
    if what == "detector":
        return "frozen_bn"
    return "bn_relu" if norm.endswith("_relu") else "bn"


class FormulaMABN2d(nn.Module):
    """MABN2d written down as the paper does, by tensor expressions and autograd, for comparison."""

    class Normalize(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, std, window, slot, plain):
            z = x / std
            ctx.save_for_backward(z, std)
            ctx.window, ctx.slot, ctx.plain = window, slot, plain
            return z

        @staticmethod
        def backward(ctx, g):
            z, std = ctx.saved_tensors
            ctx.window[ctx.slot] = psi = (g * z).mean((0, 2, 3))
            psi = psi if ctx.plain else ctx.window.mean(0)
            return (g - z * psi[:, None, None]) / std, None, None, None, None

    def __init__(self, channels, window=16, warmup_iters=100, clip_start=1000):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))
        self.running_var = torch.ones(channels)
        self.windows = torch.zeros(2, window, channels)
        self.t, self.warmup, self.clip_start = 0, warmup_iters, clip_start

    def forward(self, x):
        self.t += 1
        slot, window = self.t % self.windows.shape[1], self.windows
        plain = self.t <= window.shape[1] or self.t < self.warmup
        with torch.no_grad():
            window[0, slot] = var = (x * x).mean((0, 2, 3))
            var = var if plain else window[0].mean(0)
            std = (var + 1e-5).sqrt().to(x.dtype)[:, None, None]
            r = torch.ones_like(var)
            if self.t > max(self.clip_start, self.warmup):
                r = ((var + 1e-5) / (self.running_var + 1e-5)).sqrt().clamp(1 / 5, 5)
            self.running_var = 0.98 * self.running_var + 0.02 * var
        z = self.Normalize.apply(x, std, window[1], slot, plain)
        scale = (self.weight * r).to(x.dtype)[:, None, None]
        return z * scale + self.bias.to(x.dtype)[:, None, None]


NORMS = {
    "bn": nn.BatchNorm2d,
    "bn_relu": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
    "syncbn": nn.SyncBatchNorm,  # of one process: its cost without communication
    "gn": lambda channels: nn.GroupNorm(min(32, channels), channels),
    "in": partial(nn.InstanceNorm2d, affine=True),
    "ln": partial(nn.GroupNorm, 1),  # over C, H, W
    "brn": BatchRenorm2d,
    "mabn": MABN2d,
    "mabn_relu": partial(MABN2d, activation="relu"),
    "bn_split": partial(SplitBatchNorm2d, batch_size=2),
    "mabn_split": partial(MABN2d, split_batch=True),
    "formula": FormulaMABN2d,
    "copy": None,
}
# What Detectron2 calls them.
DETECTRON2_NORMS = {"bn": "BN", "syncbn": "SyncBN", "gn": "GN", "ln": "LN", "mabn": "MABN"}
DETECTORS = ("frozen_bn", "mabn", "mabn_folded", "mabn_folded_conv")


def choose_norms(names, known, device, what, chosen=None):
    """Split "bn,mabn" and return the names, what they are compared with first.

    Raises:
        ValueError: for a norm that is unknown here, or can't run, naming those that can.
    """
    able = [name for name in known if name != "syncbn" or device == "cuda"]
    if what != "layer":
        able = [name for name in able if name != "copy"]
    names = names.split(",")
    names = list(dict.fromkeys([*(baseline(name, what, chosen) for name in names), *names]))
    for name in names:
        if name not in able:
            raise ValueError(f"norm {name!r} is not available on {device}: {', '.join(able)} are")
    return names


def run_layer(args):
    """Forward and backward of a stack of one norm, for each thread count, dtype, format, shape."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype, layout in [(d, f) for d in args.dtype for f in args.formats]:
            for shape, depth in [(s, d) for s in args.shapes for d in args.depth]:
                like = {"dtype": DTYPES[dtype], "device": args.device}
                x, dy = (
                    torch.randn(shape, **like).contiguous(memory_format=FORMATS[layout])
                    for _ in range(2)
                )
                steps = {}
                for name in args.norms:
                    if name == "copy":
                        steps[name] = partial(torch.empty_like(dy).copy_, dy)
                        continue
                    layers = [NORMS[name](shape[1]) for _ in range(depth)]
                    net = nn.Sequential(*layers).to(args.device)
                    steps[name] = partial(layer_step, net, x.requires_grad_(), dy)
                where = {"threads": threads, "dtype": dtype, "format": layout, "shape": shape}
                yield {**where, "depth": depth}, steps


def layer_step(net, x, dy):
    torch.autograd.grad(net(x), [x, *net.parameters()], dy)


def run_inference(args):
    """A torchvision ResNet-50 with each norm in place of BatchNorm, in evaluation mode."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype, layout in [(d, f) for d in args.dtype for f in args.formats]:
            like = {"dtype": DTYPES[dtype], "device": args.device}
            images = torch.randn(args.batch, 3, args.size, args.size, **like)
            images = images.contiguous(memory_format=FORMATS[layout])
            steps = {}
            for name in args.norms:
                net = torchvision.models.resnet50(norm_layer=NORMS[name]).eval()
                steps[name] = partial(infer, net.to(**like, memory_format=FORMATS[layout]), images)
            yield (
                {
                    "threads": threads,
                    "dtype": dtype,
                    "format": layout,
                    "shape": images.shape,
                },
                steps,
            )


@torch.inference_mode()
def infer(net, images):
    return net(images)


def run_detector(args):
    """Detectron2's Mask R-CNN R50-FPN in evaluation mode, with equal detections under each norm."""
    from mabn_d2 import fold_mabn

    source = detector("MABN", args.device)
    folded = fold_mabn(source)
    stock = detector("FrozenBN", args.device)
    stock.load_state_dict(folded.state_dict())
    made = {
        "frozen_bn": lambda: stock,
        "mabn": lambda: source,
        "mabn_folded": lambda: folded,
        "mabn_folded_conv": lambda: fold_mabn(source, "conv"),
    }
    models = {name: made[name]() for name in args.norms}
    images = [{"image": random_image(args.size)["image"]} for _ in range(args.batch)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        steps = {name: partial(infer, model, images) for name, model in models.items()}
        shape = (args.batch, 3, args.size, args.size)
        yield {"threads": threads, "dtype": "fp32", "format": "nchw", "shape": shape}, steps


def run_step(args):
    """A training step of Detectron2's Mask R-CNN R50-FPN, norms in backbone, FPN and heads."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        images = [random_image(args.size) for _ in range(args.batch)]
        for dtype in args.dtype:
            steps = {}
            for name in args.norms:
                model = detector(DETECTRON2_NORMS[name], args.device, training=True)
                optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
                steps[name] = partial(train_step, model, optimizer, images, args.device, dtype)
            shape = (args.batch, 3, args.size, args.size)
            yield {"threads": threads, "dtype": dtype, "format": "nchw", "shape": shape}, steps


def detector(norm, device, training=False):
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = device, "", 0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
    for node in cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD:
        node.NORM = norm
    if training:
        # As many regions under each norm in each step, whatever an untrained model proposes: with all
        # its 1000 proposals and OBJECTS true boxes, 512 an image, of which OBJECTS have a mask.
        cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = 1.0, [0.7]
    return build_model(cfg).train(training)


def random_image(size, objects=OBJECTS):
    """A noise image with rectangles to detect, as Detectron2 gives it to a model."""
    from detectron2.structures import BitMasks, Boxes, Instances

    corners = torch.rand(objects, 2) * size * 0.6
    boxes = torch.cat([corners, corners + size * (0.1 + 0.3 * torch.rand(objects, 2))], 1)
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    classes = torch.randint(80, (objects,))
    fields = {"gt_boxes": Boxes(boxes), "gt_classes": classes, "gt_masks": BitMasks(masks)}
    instances = Instances((size, size), **fields)
    return {"image": torch.randint(256, (3, size, size), dtype=torch.uint8), "instances": instances}


def train_step(model, optimizer, images, device, dtype):
    from detectron2.utils.events import EventStorage

    with EventStorage() as storage, torch.autocast(device, DTYPES[dtype], enabled=dtype != "fp32"):
        loss = sum(model(images).values())
        counts = [storage.latest()[f"roi_head/num_{kind}_samples"][0] for kind in ("fg", "bg")]
    if counts != [OBJECTS, 512 - OBJECTS]:
        raise RuntimeError(
            f"{counts} regions with and without an object: other work than in other steps"
        )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def plot(report, path):
    """Draw time against size, and the ratios to BatchNorm, of all rows of a report."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows, norms = report["results"], report["settings"]["norms"]
    lines = list(dict.fromkeys((r["dtype"], r["format"], r["threads"], r["depth"]) for r in rows))
    for k, norm in enumerate(norms):
        for i, line in enumerate(lines):  # one colour a norm, one line a case
            of_line = [
                r
                for r in sorted(rows, key=lambda r: r["elements"])
                if r["norm"] == norm and (r["dtype"], r["format"], r["threads"], r["depth"]) == line
            ]
            x, y = [r["elements"] for r in of_line], [r["ms"][1] for r in of_line]
            left.plot(x, y, "o-", color=f"C{k}", label=None if i else norm, linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="elements (N C H W, depth)", ylabel="ms")
    left.legend()
    cases = list(dict.fromkeys((r["dtype"], r["format"], r["threads"]) for r in rows))
    width = 0.8 / len(norms)
    for k, norm in enumerate(norms):
        heights = []
        for case in cases:
            ratios = [
                r["ratio"][1]
                for r in rows
                if r["norm"] == norm and (r["dtype"], r["format"], r["threads"]) == case
            ]
            heights.append(torch.tensor(ratios).log().mean().exp().item())
        right.bar(
            [i + k * width for i in range(len(cases))], heights, width, color=f"C{k}", label=norm
        )
    labels = [f"{dtype} {layout}\n{threads} threads" for dtype, layout, threads in cases]
    right.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], labels, fontsize=7)
    right.axhline(1, color="gray", linewidth=0.7)
    right.set(ylabel="time / BatchNorm, geometric mean over sizes")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def table(results):
    """Return the rows of a report as text."""
    headers = "threads dtype format shape norm ms quartiles ratio quartiles peak-MiB 1/s".split()
    shares = any("of_copy" in r for r in results)
    headers += ["of copy"] if shares else []
    rows = []
    for r in results:
        (a, ms, b), (c, ratio, d) = r["ms"], r["ratio"]
        shape = "x".join(map(str, r["shape"])) + (f" x{r['depth']}" if r["depth"] > 1 else "")
        row = [r["threads"], r["dtype"], r["format"], shape, r["norm"], f"{ms:.2f}"]
        row += [f"{a:.2f}-{b:.2f}", f"{ratio:.2f}", f"{c:.2f}-{d:.2f}"]
        row += [f"{r['peak_bytes'] / 2**20:.1f}", f"{1000 / ms:.2f}"]
        rows.append(row + ([f"{r.get('of_copy', 1):.2f}"] if shares else []))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


RUNS = {
    "layer": run_layer,
    "inference": run_inference,
    "detector": run_detector,
    "step": run_step,
}


def parse(argv=None):
    def listed(convert, text):
        return [convert(part) for part in text.split(",")]

    def choice(known, text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    def shapes(text):
        if text == "r50_fpn":
            return R50_FPN
        return [tuple(int(size) for size in part.split("x")) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=["fp32"], type=partial(listed, partial(choice, DTYPES)))
    parser.add_argument("--norms", help="comma-separated; default: all of a detector, bn,mabn else")
    parser.add_argument("--baseline", help="norm that all are compared with")
    parser.add_argument("--output", type=Path, help="JSON file; a PNG file goes beside it")
    parser.add_argument(
        "--threads", default=[torch.get_num_threads()], type=partial(listed, int), help="1,2"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-seconds", type=float, default=0.05)
    parser.add_argument(
        "--formats",
        default=["nchw"],
        type=partial(listed, partial(choice, FORMATS)),
        help="nchw,nhwc",
    )
    parser.add_argument(
        "--shapes",
        default=[(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 32, 32)],
        type=shapes,
        help="layer: 2x64x128x128,... or r50_fpn, those of 2 images of 800x1333",
    )
    parser.add_argument(
        "--depth", default=[1], type=partial(listed, int), help="layer: norms in a row, 1,2,4"
    )
    parser.add_argument("--batch", type=int, default=2, help="inference, step: images")
    parser.add_argument("--size", type=int, default=224, help="inference, step: pixels a side")
    parser.add_argument(
        "--clock",
        choices=measure.CLOCKS,
        help="cpu: seconds of all threads' work, where others use the machine (default: wall, cuda)",
    )
    args = parser.parse_args(argv)
    args.norms = args.norms or (",".join(DETECTORS) if args.what == "detector" else "bn,mabn")
    args.clock = args.clock or {"cpu": "wall", "cuda": "cuda"}[args.device]
    try:
        known = {"step": DETECTRON2_NORMS, "detector": DETECTORS}.get(args.what, NORMS)
        args.norms = choose_norms(args.norms, known, args.device, args.what, args.baseline)
        if (args.device == "cuda") != (args.clock == "cuda"):
            raise ValueError("--clock cuda goes with --device cuda, wall and cpu with cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device")
        if args.rounds < 2:
            raise ValueError("quartiles need two rounds")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(0)
    results = []
    for case, steps in RUNS[args.what](args):
        clock = measure.CLOCKS[args.clock]
        times = measure.measure(steps, args.rounds, args.round_seconds, clock)
        elements = torch.Size(case["shape"]).numel() * case.get("depth", 1)
        for norm in steps:
            row = {"depth": 1, **case, "elements": elements, "norm": norm}
            row |= measure.summarize(times[norm], times[baseline(norm, args.what, args.baseline)])
            if "copy" in steps and norm != "copy":
                share = PASSES / 2 * case["depth"]
                row["of_copy"] = share / measure.summarize(times[norm], times["copy"])["ratio"][1]
            results.append({**row, "peak_bytes": measure.memory_peak(steps[norm], args.device)})
        print(table(results[-len(steps) :]), flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"settings": settings, **measure.describe(args.device), "results": results}
    if args.output:
        measure.write_json(report, args.output)
        plot(report, args.output.with_suffix(".png"))
    return report


if __name__ == "__main__":
    main()
