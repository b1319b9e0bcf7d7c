"""The docstrings, which are plain text with a little reStructuredText in it, as mkdocstrings reads them."""

import pathlib
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod):`([\w.]+)`")
PAGES = sorted((pathlib.Path(__file__).parent / "api").glob("*.md"))
DOCUMENTED = [path for page in PAGES for path in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
PLACE = {path.rpartition(".")[2]: path for path in DOCUMENTED}  # public name → where it is defined


class Docstrings(griffe.Extension):
    """References become links, and a section that opens a docstring gets back the indentation that tells it is one."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if not obj.docstring:
            return
        text = obj.docstring.value
        if text.startswith("Attributes:\n") and not text.startswith("Attributes:\n "):
            text = text.replace("\n", "\n  ")
        obj.docstring.value = ROLE.sub(lambda role: link(role[1], obj.module.path), text)


def link(name: str, module: str) -> str:
    """``name``, of this module or of the package, linked to where it is documented."""
    if not name.startswith("tbptt_jax."):
        return f"[`{name}`][{PLACE.get(name, f'{module}.{name}')}]"
    public = name.removeprefix("tbptt_jax.")
    return f"[`tb.{public}`][{PLACE.get(public, name)}]"
