"""Answers questions about images on small machines: numpy, onnxruntime, pillow and psutil, nothing else.

model = Model.load("bundle")
for piece in model.answer(["photo.jpg"], "What is in this image?"):
print(piece, end="")
"""

from lfm_runtime.errors import BundleError, EdgeError, GraphContractError, ImageError, PromptError, SettingError
from lfm_runtime.model import Answer, Model
from lfm_runtime.prompt import Message
from lfm_runtime.report import Report

__version__ = "0.1.0"

__all__ = [
    "Answer", "BundleError", "EdgeError", "GraphContractError", "ImageError", "Message", "Model", "PromptError", "Report",
    "SettingError", "__version__",
]  # fmt: skip
