"""Where the page's static files are: the server sends them, and reports take the style sheet from there."""

from pathlib import Path

PAGE = Path(__file__).with_name("page")


def page_file(name: str) -> Path:
    return PAGE / name
