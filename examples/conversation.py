"""Several turns about one image, then a fork of the conversation: conversation.py BUNDLE IMAGE"""

import sys

from lfm_runtime import Model, Session

bundle, image = sys.argv[1:]
session = Session(Model.load(bundle))
print(session.ask("What is in this image?", [image]).text())
other = session.fork()  # same conversation so far; the image is not encoded again
print(session.ask("How many shapes?").text())
print(other.ask("What colour is the first?").text())
