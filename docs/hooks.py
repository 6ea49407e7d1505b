"""MkDocs hooks: add the lab book, the changelog, CONTRIBUTING.md and the records to the site.

The pages of docs/ link to these files as they lie in the repository, one folder up (`../LOG.md`). On the site they lie
beside the pages, so the leading `../` is removed.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("LOG.md", "CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files, config):
    """Adds files from outside docs/ to the site."""
    records = [path for path in ROOT.glob("records/*/*") if path.suffix in (".md", ".png")]
    for path in [*(ROOT / name for name in PAGES), *sorted(records)]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at the places that files have on the site."""
    if page.file.src_uri == "CONTRIBUTING.md":
        return re.sub(r"\]\(docs/", "](", markdown)
    outside = page.file.src_uri.startswith("records/") or page.file.src_uri in PAGES
    return markdown if outside else re.sub(r"\]\(\.\./", "](", markdown)
