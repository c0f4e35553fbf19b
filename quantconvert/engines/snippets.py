"""A line that loads a model as Python that runs by itself."""

from __future__ import annotations

import ast
import re

_FROM_TRANSFORMERS = re.compile(r"(Auto|Awq|GPTQ|CompressedTensors)\w*")


def snippet(line: str) -> str:
    """A line of Python that loads a model, with the imports that it needs and the model as a variable."""
    code, _, comment = line.partition("  # ")
    *before, call = code.split("; ")
    names = {node.id for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Name)}
    imports = f"from transformers import {', '.join(sorted(n for n in names if _FROM_TRANSFORMERS.fullmatch(n)))}"
    needs = [f"# needs {comment}"] if comment else []
    return "\n".join([*needs, *before, imports, "", f"model = {call}"])
