"""What a detector is trained on, made of noise."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances


def training_inputs(height=128, width=160, semantic=False):
    """Return two records as DatasetMapper gives them, one instance each; uint8 images."""
    inputs = []
    for k in range(2):
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 0.6 * width, 0.8 * height]]))
        target.gt_classes = torch.tensor([k])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, 20 : int(0.8 * height), 10 : int(0.6 * width)] = True
        target.gt_masks = BitMasks(mask)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        record = {"image": image, "instances": target, "height": height, "width": width}
        inputs.append(record | ({"sem_seg": mask[0].long()} if semantic else {}))
    return inputs
