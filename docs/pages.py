"""The order of the pages on the site. A new page needs no entry: it is put at the end of the guides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

START = ["index.md", "questions.md", "concepts.md"]
GUIDES = [
    "loading-weights.md",
    "weights-files.md",
    "open-old-models.md",
    "fine-tuning.md",
    "feature-cache.md",
    "evaluation.md",
]
BACKGROUND = ["neurons.md", "architecture.md"]
REFERENCE = ["api.md"]


def on_config(config: Any) -> Any:
    """Called by MkDocs with its settings: writes the navigation."""
    there = {path.name for path in Path(config.docs_dir).glob("*.md")}
    others = sorted(there.difference(START, GUIDES, BACKGROUND, REFERENCE))
    sections = {"Start": START, "Guides": [*GUIDES, *others], "Background": BACKGROUND, "Reference": REFERENCE}
    listed = {title: [page for page in pages if page in there] for title, pages in sections.items()}
    config.nav = [{title: pages} for title, pages in listed.items() if pages]
    return config
