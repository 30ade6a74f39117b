"""A hook of mkdocs: turn links that leave docs/ into plain text.

On the site there is nothing behind them; where the repository is browsed there is.
"""

import re
from typing import Any

LEAVING = re.compile(r"\[([^]\[]*)\]\(((?:\.\./)+([^)\s]*))\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `[results](../experiments/x.json)` by "results (`experiments/x.json`)"."""
    if page.file.src_uri.count("/"):
        return markdown  # a page of the API, whose links stay within docs/
    return LEAVING.sub(r"\1 (`\3`)", markdown)
