"""The config node of this package."""

from detectron2.config import CfgNode as CN

# A number that follows from the training images or from the training's length (engine/schedule.py).
AUTO = -1


def add_mabn_config(cfg: CN) -> None:
    """Add the keys of this package, with their default values, to a Detectron2 config.

    Args:
        cfg: changed in place, such as what `detectron2.config.get_cfg()` returns.
    """
    # Moving Average Batch Normalization; symbols are its paper's.
    cfg.MODEL.MABN = CN()
    # B, images in one normalization batch. 0: the images of one forward, that is
    # SOLVER.IMS_PER_BATCH / (processes * SOLVER.ACCUMULATION_STEPS).
    cfg.MODEL.MABN.BATCH_SIZE = 0
    # Images that the moving averages (SMAS) span: the window is m = SIMULATED_BATCH_SIZE / B
    # forwards.
    cfg.MODEL.MABN.SIMULATED_BATCH_SIZE = 32
    # alpha, the share of the old value that the running variance (EMAS) keeps.
    cfg.MODEL.MABN.MOMENTUM = 0.98
    # T: optimizer iterations before this one use the statistics of their own batch.
    cfg.MODEL.MABN.WARMUP_ITERS = 100
    # Optimizer iterations with r = 1, at least WARMUP_ITERS. The value is for 90,000 iterations or
    # more; scale it with the length of shorter schedules.
    cfg.MODEL.MABN.CLIP_START = 1000
    # lambda, r stays within [1 / CLIP_LIMIT, CLIP_LIMIT].
    cfg.MODEL.MABN.CLIP_LIMIT = 5.0
    # epsilon, added to every second moment.
    cfg.MODEL.MABN.EPS = 1e-5
    # Average the running variances over the ranks before evaluation and checkpoints. If not, each rank
    # evaluates by its own and rank 0's are saved, as with Detectron2's BatchNorm.
    cfg.MODEL.MABN.SYNC_BEFORE_EVAL = False

    # Convert weights of a BatchNorm model when a run starts from them: filters are centred, means folded,
    # running_var recalibrated on training images before the first iteration. If not, such weights are
    # an error, because they compute something else under MABN.
    cfg.MODEL.MABN.CONVERT_WEIGHTS = False

    # Write the statistics of LOG_LAYERS (names of norm layers; none: the first, middle and last) to
    # TensorBoard and metrics.json every so many iterations; 0: never. See engine/hooks/log_statistics.py.
    cfg.MODEL.MABN.LOG_PERIOD = 0
    cfg.MODEL.MABN.LOG_LAYERS = ()

    # What to do with an image or annotation that can't be used: "stop", with its path or id, or
    # "skip", logged and counted (the scalar bad_images).
    cfg.DATALOADER.BAD_INPUT = "stop"

    # Settings of two of Detectron2's samplers (DATALOADER.SAMPLER_TRAIN), which its own config lacks.
    # RandomSubsetTrainingSampler: the share of the images that is trained on.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.1
    # WeightedTrainingSampler and WeightedCategoryTrainingSampler: pairs of a dataset of DATASETS.TRAIN
    # and how often each of its images is drawn in an epoch; 1 for the others.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []

    # Own images: a folder as a labelling tool writes it, or a COCO JSON file, that DATASETS.TRAIN and
    # TEST, the number of classes and the masks are set from (tools/train_net.py --data). "": not used.
    cfg.DATASETS.FOLDER = ""
    # Share of its images that validate if it has no such part; a hash of their names decides which.
    cfg.DATASETS.VAL_SHARE = 0.2

    # Batch Renormalization, the norm type "BRN"; symbols are Ioffe's (2017).
    cfg.MODEL.BRN = CN()
    # 1 - alpha, the share of the old values that the running statistics keep.
    cfg.MODEL.BRN.MOMENTUM = 0.99
    # Optimizer iterations of plain BatchNorm. This key and the next are for long schedules: scale
    # them.
    cfg.MODEL.BRN.WARMUP_ITERS = 5000
    # Bound of r, the ratio of the standard deviations, and the iteration that it is reached at.
    cfg.MODEL.BRN.R_MAX = 3.0
    cfg.MODEL.BRN.R_MAX_ITER = 40000
    # Bound of d, the difference of the means in standard deviations, likewise.
    cfg.MODEL.BRN.D_MAX = 5.0
    cfg.MODEL.BRN.D_MAX_ITER = 25000
    # epsilon, added to every variance.
    cfg.MODEL.BRN.EPS = 1e-5

    # Groups of each Group Normalization layer ("GN"). Detectron2's 32 make a layer of 32 channels an
    # instance normalization; a narrow model needs fewer. Both this and 32 must divide the channels.
    cfg.MODEL.GN = CN()
    cfg.MODEL.GN.NUM_GROUPS = 32

    # n: a process runs the images of one optimizer iteration as n micro-batches, one after another,
    # and averages their gradients. SOLVER.IMS_PER_BATCH stays the images of one optimizer iteration, so
    # a micro-batch has IMS_PER_BATCH / (processes * n) images. One process with n micro-batches sees
    # the same images, and gets the same gradients, as n processes; but RetinaNet and FCOS divide their
    # losses by a moving average, which moves with each micro-batch.
    cfg.SOLVER.ACCUMULATION_STEPS = 1

    # "SGD" or "ADAMW", both with the settings of SOLVER (MOMENTUM and NESTEROV are SGD's).
    cfg.SOLVER.OPTIMIZER = "SGD"

    # The rest serves short trainings on own images: see configs/own_data_*.yaml and engine/schedule.py.
    # Passes over the training images. It sets MAX_ITER where that is AUTO; a number there wins.
    cfg.SOLVER.EPOCHS = 0
    # Learning rate for 16 images in one optimizer iteration. It sets BASE_LR where that is AUTO, in
    # proportion to IMS_PER_BATCH.
    cfg.SOLVER.LR_FOR_16_IMAGES = 0.02
    # Weights to start from if this file exists and MODEL.WEIGHTS names no other.
    cfg.MODEL.WEIGHTS_IF_PRESENT = ""
    # Newest checkpoints to keep besides model_final.pth and model_best.pth. 0: all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    # Losses on DATASETS.TEST at each evaluation, as in training but with norms as in evaluation: the
    # scalars validation/total_loss and validation/<loss>.
    cfg.TEST.VALIDATION_LOSS = False
    # What model_best.pth is best in: a scalar of the evaluation, such as "segm/AP" or
    # "validation/total_loss" (of the losses in validation/, the lowest is best). "auto": the AP of masks
    # if there are masks, else of boxes (of a model with other outputs: their measure). "": no
    # model_best.pth.
    cfg.TEST.BEST_METRIC = ""
    # Test images that are drawn for TensorBoard at each evaluation, truth above predictions.
    cfg.TEST.PICTURES = 0
    # Stop when so many evaluations in a row have not been better in BEST_METRIC. 0: never.
    cfg.SOLVER.EARLY_STOPPING_PATIENCE = 0
