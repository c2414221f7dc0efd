"""One question about images, the answer streamed: describe.py BUNDLE IMAGE…"""

import sys

from lfm_runtime import EdgeError, Model

if len(sys.argv) < 3:
    sys.exit(__doc__)
bundle, *images = sys.argv[1:]
try:
    model = Model.load(bundle)
    for piece in model.answer(images, "What is in this image?"):
        print(piece, end="", flush=True)
    print()
except EdgeError as e:  # one line: what, where, and what to do
    sys.exit(str(e))
