"""Several turns about one image, then a fork of the conversation: conversation.py BUNDLE IMAGE"""

import sys

from lfm_runtime import Chat, EdgeError, Model

if len(sys.argv) != 3:
    sys.exit(__doc__)
bundle, image = sys.argv[1:]
try:
    chat = Chat(Model.load(bundle))
    print(chat.ask("What is in this image?", [image]).text())
    other = chat.fork()  # same conversation so far; the image is not encoded again
    print(chat.ask("How many shapes?").text())
    print(other.ask("What colour is the first?").text())
except EdgeError as e:
    sys.exit(str(e))
