"""Texts of a statement, which a stranger may have written, as parts of code and of blocks of code."""

import json


def quote_python(text: str) -> str:
    r"""Return `text` as Python writes it, in ASCII, without anything that ends a block of code.

    >>> quote_python('a "b" `c`')
    '"a \\"b\\" \\u0060c\\u0060"'
    """
    return escape_markup(json.dumps(text) if all(ord(c) < 1 << 16 for c in text) else ascii(text))


def quote_shell(text: str) -> str:
    """Return a name as one word of a command line, without anything that a shell would read.

    >>> quote_shell("user/model; rm -r .")
    'user/modelrm-r.'
    """
    return "".join(c for c in text if c.isalnum() or c in "/._-")


def escape_markup(text: str) -> str:
    r"""Return JSON whose texts hold nothing that ends a block of code or is markup; its values are the same.

    >>> escape_markup('"<b> `x`"')
    '"\\u003cb> \\u0060x\\u0060"'
    """
    return text.replace("`", "\\u0060").replace("<", "\\u003c")
