# The twin of configs/scratch_mask_rcnn_R50_FPN_mabn_2x.yaml: same model, schedule and data.
# Published: box AP 36.50, mask AP 32.69.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from mabn_d2.modeling import PublishedConvFCHead, PublishedResNet

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.pixel_mean = [102.9801, 115.9465, 122.7717]
model.pixel_std = [1.0, 1.0, 1.0]
model.backbone.norm = "MABN"
model.backbone.bottom_up._target_ = PublishedResNet
model.backbone.bottom_up.stem.norm = "MABN"
model.backbone.bottom_up.stages.norm = "MABN"
model.backbone.bottom_up.freeze_at = 0
model.proposal_generator.smooth_l1_beta = 1 / 9
model.proposal_generator.anchor_boundary_thresh = 0
_heads = model.roi_heads
_heads.box_head._target_ = PublishedConvFCHead
_heads.box_head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm="MABN")
_heads.box_predictor.smooth_l1_beta = 1.0
_heads.mask_head.conv_norm = "MABN"
for _pooler in (_heads.box_pooler, _heads.mask_pooler):
    _pooler.update(pooler_type="ROIAlign", sampling_ratio=2)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = (800,)

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.params = L(get_default_optimizer_params)(
    base_lr="${..lr}",
    weight_decay="${..weight_decay}",
    bias_lr_factor=2.0,
    weight_decay_norm=1e-4,
    weight_decay_bias=0.0,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[120000, 160000, 180000]
    ),
    warmup_length=500 / 180000,
    warmup_method="linear",
    warmup_factor=1 / 3,
)

train = model_zoo.get_config("common/train.py").train
train.max_iter = 180000
train.output_dir = "output/lazy/scratch_mask_rcnn_R50_FPN_mabn_2x"
# Arguments of mabn_d2.configure_mabn; batch_size is the images of one GPU.
train.mabn = dict(batch_size=2, simulated_batch_size=32, warmup_iters=100, clip_start=1000)
