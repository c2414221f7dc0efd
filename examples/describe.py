"""One question about images, the answer streamed: describe.py BUNDLE IMAGE…"""

import sys

from lfm_runtime import Model

bundle, *images = sys.argv[1:]
model = Model.load(bundle)
for piece in model.answer(images, "What is in this image?"):
    print(piece, end="", flush=True)
print()
