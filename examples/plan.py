"""The tokens and memory that a run would need here, before anything is loaded: plan.py BUNDLE IMAGE…"""

import sys

from lfm_runtime import EdgeError
from lfm_runtime.images.pixels import image_size
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Ask

if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
    sys.exit(__doc__)
bundle, *images = sys.argv[1:]
try:
    setup = resolve(bundle, ask=Ask(tuple(map(image_size, images)), "What is in this image?"))
except EdgeError as e:  # not even the smallest setup fits; the message has the numbers
    sys.exit(str(e))
print(setup.summary)
if setup.forecast:
    print(f"{setup.forecast.prompt_tokens} prompt tokens, {setup.forecast.memory.peak:.0f} MiB at the peak")
for step in setup.steps:
    print("to fit the memory:", step)
