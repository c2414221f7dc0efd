"""Milliseconds and megabytes of an answer: measure.py BUNDLE IMAGE"""

import sys

from lfm_runtime import EdgeError, Model

if len(sys.argv) != 3:
    sys.exit(__doc__)
bundle, image = sys.argv[1:]
try:
    model = Model.load(bundle, max_image_tokens=128)  # any profile setting can be given
    for _ in range(3):
        answer = model.answer([image], "What is in this image?", temperature=0, max_new_tokens=16)
        answer.text()
        times, memory = answer.report.timing_ms, answer.report.memory_mib
        print(
            f"first token {times['ttft']:.0f} ms, whole answer {times['total']:.0f} ms, peak {memory['peak']:.0f} MiB"
        )
except EdgeError as e:
    sys.exit(str(e))
