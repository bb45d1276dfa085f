"""Paths of the page's static files. The server sends them; reports embed the style sheet."""

from pathlib import Path

PAGE = Path(__file__).with_name("page")


def page_file(name: str) -> Path:
    return PAGE / name
