"""Answers questions about images on small machines: numpy, onnxruntime, pillow and psutil, nothing else.

model = Model.load("bundle")
for piece in model.answer(["photo.jpg"], "What is in this image?"):
    print(piece, end="")
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime's wheels since 1.29 send telemetry unless this is set before its import, which any module below may cause.
# A user's own setting stands.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from lfm_runtime.errors import (
    BundleError,
    EdgeError,
    GraphContractError,
    ImageError,
    OutOfMemoryError,
    PromptError,
    SettingError,
)

if TYPE_CHECKING:
    from lfm_runtime.answer.reply import Answer
    from lfm_runtime.conversation import Chat
    from lfm_runtime.model import Model
    from lfm_runtime.report import Report
    from lfm_runtime.text.messages import IMAGE, Conversation, Message, ToolCall

try:
    from lfm_runtime._version import __version__  # written when the package is built or installed in place
except ImportError:
    __version__ = "0.dev0"  # sources that were never installed

__all__ = [
    "IMAGE",
    "Answer",
    "BundleError",
    "Chat",
    "Conversation",
    "EdgeError",
    "GraphContractError",
    "ImageError",
    "Message",
    "Model",
    "OutOfMemoryError",
    "PromptError",
    "Report",
    "SettingError",
    "ToolCall",
    "__version__",
]

# Loaded when first used, so that `lfm-edge --help` waits for neither numpy nor onnxruntime.
_LATER = {
    "Answer": "answer.reply",
    "Model": "model",
    "Report": "report",
    "Chat": "conversation",
    "IMAGE": "text.messages",
    "Conversation": "text.messages",
    "Message": "text.messages",
    "ToolCall": "text.messages",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
