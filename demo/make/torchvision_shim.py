"""Import before transformers where torchvision sits beside a CPU-only torch.

torchvision's compiled operators do not load there. Declaring the two that its Python part asks for is enough for the
reference image processor, which uses none of them. The registration lives as long as this module.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
