"""Runs an exported detector in a process that has neither Detectron2 nor this package.

Arguments: the exported file, an .npz file of images, the .npz file to write.
"""

import sys

import numpy as np

sys.modules["detectron2"] = sys.modules["mabn_d2"] = None  # an import of either would fail

exported, images, output = sys.argv[1:]
images = np.load(images)
if exported.endswith(".onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])

    def run(image):
        return session.run(None, {"image": image})
else:
    import torch
    import torchvision  # noqa: F401 (its operators)

    program = exported.endswith(".pt2")
    model = torch.export.load(exported).module() if program else torch.jit.load(exported)

    def run(image):
        with torch.no_grad():
            found = torch.utils._pytree.tree_leaves(model(torch.from_numpy(image)))
        return [value.numpy() for value in found]


results = {
    f"{name} {position}": value
    for name in images.files
    for position, value in enumerate(run(images[name]))
}
np.savez(output, **results)
