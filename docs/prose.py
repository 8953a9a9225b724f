"""Checks the prose of the documents and of the texts in the code: python docs/prose.py [FILE ...]

The base is the public rules of proselint. On top of them come this project's own: words that have a better one, at most
MAX_WORDS words a sentence, one sentence a line, and lines and table cells of at most MAX_CHARACTERS. Without FILE, all
of CHECKED are checked. Code blocks, inline code and generated parts are left out. Texts in the code are checked for
the words only. Prints each finding and exits with status 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from proselint.checks import __register__ as PUBLIC  # noqa: N812 - proselint calls the list of its checks so
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).parent.parent
CHECKED = (
    "*.md",
    "docs/**/*.md",
    "deploy/README.md",
    "contrib/**/README.md",
    "examples/**/README.md",
    "docs/reference.py",
    "docs/reasons.py",
    "docs/spans.py",
    "usbip_plugin/**/*.py",
    "usbip_sim/**/*.py",
)
"""The documents and modules that are checked, as globs below ROOT."""

MAX_WORDS = 24
"""Words of one sentence. Inline code is one word."""
MAX_CHARACTERS = 119
"""Characters of a line, or of one cell in a line of a table, without the targets of links."""

OFF = {
    "typography": False,  # quotes, ellipses and signs are those that a keyboard has
    "dates_times": False,  # it takes "from 5 on" for a range of dates
    "spelling.able_atable": False,  # Kubernetes writes "allocatable"
    "redundancy.misc.after_the_deadline": False,  # it reads "and etc" in "and etcd"
}
"""Rules of proselint that do not fit."""

WORDS = (
    (r"any ?more", "no longer"),
    (r"anew", "again"),
    (r"as above|the latter|see the module|the same of", "the noun itself"),
    (r"attach(ed|es|ing)? again", "re-attach"),
    (r"be had", "available"),
    (r"bear(er|ers|s)|glances?|mend(ed|s)?|oddit(y|ies)|seekers?|wishes", "the word of the field"),
    (r"(?<!\{)(?-i:busids?)", "bus ID"),  # {busid} is a field of containerPath
    (r"but for", "except"),
    (r"(?<!there )(is|are|was|were) (no|none of)(?! longer)", "is not"),
    (r"for want of", "without"),
    (r"is wanted|are wanted", "expected"),
    (r"let(s|ting)? go( of)?", "release"),
    (r"(no|every|any|some)body's", "a noun"),
    (r"(?-i:reattach\w*)", "re-attach"),
    (r"tells?|telling|told", "a verb of the field: reports, returns, shows"),
    (r"worked out", "computed, evaluated"),
)
"""Pairs of a pattern of words to avoid, and what to write instead."""
_WORDS = [(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), instead) for pattern, instead in WORDS]

_INVERTED = re.compile(r"(Neither|Nor|So (is|are|does|do|has|was|were)|What|Who|Whoever|Whose|Which)\b.*[^?]$")
_LEFT_OUT = re.compile(r"^( *)```.*?^\1```|<!-- generated.*?<!-- end.*?-->|<!--.*?-->", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^ {1,3}```", re.MULTILINE)
_CODE = re.compile(r"(`+)[^`]+\1")
_TARGET = re.compile(r"(?<=\])\([^)\s]+\)")
_ITEM = re.compile(r"[\s>]*(?:(?:[-*+]|\d+\.)\s+)?(?:\*\*[^*]+\*\*)?\s*")
_OWN_LINE = re.compile(r"\s*(?:[-*+] |\d+\. |[#|>!<]|\[!|\[[^]]*\]:|$)")
_END = re.compile(r"""(?<!e\.g)(?<!i\.e)[.!?]["')*]*\s+(?=[`"'(*\[]*[A-Z`])""")
_COMPLETE = re.compile(r"""[.!?:]["')*]*\s*$""")

Finding = tuple[int, str]
"""A line and what is wrong in it."""


def document(text: str) -> Iterator[Finding]:
    """Yields what is wrong in a Markdown document."""
    for fence in _FENCE.finditer(text):
        yield text.count("\n", 0, fence.start()) + 1, "a code block in a list: indent it by 4 spaces for the site"
    text = _LEFT_OUT.sub(lambda part: re.sub(r"[^\n]", " ", part[0]), text)
    text = _TARGET.sub("", _CODE.sub(lambda code: "`" + "x" * (len(code[0]) - 2) + "`", text))
    yield from _public(re.sub(r"^#.*", "", text, flags=re.MULTILINE))
    lines = text.splitlines()
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        table = line.lstrip().startswith("|")
        parts = [cell.strip() for cell in line.strip().strip("|").split("|")] if table else [line.rstrip()]
        for part in parts:
            if len(part) > MAX_CHARACTERS:
                yield number, f"{len(part)} characters, more than {MAX_CHARACTERS}"
            yield from ((number, problem) for problem in words(part))
            sentences = _END.split(_ITEM.sub("", part, count=1))
            for sentence in sentences:
                if len(sentence.split()) > MAX_WORDS:
                    yield number, f"a sentence of {len(sentence.split())} words, more than {MAX_WORDS}"
                if _INVERTED.match(sentence):
                    yield number, f"begins with '{sentence.split()[0]}': begin with the subject"
            if not table and len(sentences) > 1:
                yield number, "several sentences in one line"
        if not _OWN_LINE.match(following) and line.strip() and not line.startswith("#") and not _COMPLETE.search(line):
            yield number, "the sentence goes on in the next line"


def _public(text: str) -> Iterator[Finding]:
    registry = CheckRegistry()
    if not registry.checks:
        registry.register_many(PUBLIC)
    checks = dict(sorted((DEFAULT["checks"] | OFF).items(), key=lambda check: -check[0].count(".")))
    for found in LintFile("", text).lint({**DEFAULT, "checks": checks}):
        yield found.pos[0], f"{found.check_result.message} ({found.check_result.check_path})"


def words(text: str) -> Iterator[str]:
    """Yields what is wrong with the words of a text."""
    for pattern, instead in _WORDS:
        for found in pattern.finditer(text):
            yield f"'{found[0]}': {instead}"


def code(source: str) -> Iterator[Finding]:
    """Yields what is wrong in the texts of a Python module: in all its strings of several words except docstrings."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in alone:
            continue
        if " " in node.value.strip():
            yield from ((node.lineno, problem) for problem in words(node.value))


def checked() -> Iterator[Path]:
    """Yields the files that CHECKED names."""
    for pattern in CHECKED:
        yield from sorted(ROOT.glob(pattern))


def main(files: Iterable[Path]) -> int:
    """Prints what is wrong in the files. Returns the exit status."""
    status = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        for line, problem in code(text) if path.suffix == ".py" else document(text):
            print(f"{path}:{line}: {problem}")  # noqa: T201 - this is what it is for
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or checked()))
