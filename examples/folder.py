"""Every image of a folder, four answers decoded together, one JSON line per image: folder.py BUNDLE FOLDER"""

import json
import sys
from pathlib import Path

from lfm_runtime import EdgeError, Model
from lfm_runtime.batch import answer_all

if len(sys.argv) != 3 or not Path(sys.argv[2]).is_dir():
    sys.exit(__doc__)
bundle, folder = sys.argv[1:]
images = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
questions = (([image], "What is in this image?") for image in images)
try:
    model = Model.load(bundle)
except EdgeError as e:
    sys.exit(str(e))
for index, answer in answer_all(model, questions, rows=4, max_new_tokens=32):  # in the order they finish
    said = {"error": str(answer)} if isinstance(answer, EdgeError) else {"text": answer.text}
    print(json.dumps({"image": images[index].name, **said}), flush=True)
