"""Chat templates without jinja2: the part of Jinja that chat templates use, with the settings of transformers.

`Template(source)` parses, `render(**values)` gives the text that transformers' `apply_chat_template` gives:
trim_blocks, lstrip_blocks, loop controls, `{% generation %}`, `tojson` without HTML escapes, `raise_exception`,
`strftime_now`. Values are what JSON knows. What is not known here is an error that names it; nothing is guessed.
Grammar and semantics: Jinja 3.1 (https://jinja.palletsprojects.com); export compares both on every template that it
takes.
"""

from lfm_runtime.text.chat_template.template import Template
from lfm_runtime.text.chat_template.values import TemplateError

__all__ = ["Template", "TemplateError"]
