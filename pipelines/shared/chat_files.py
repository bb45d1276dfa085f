"""Files of chat templates."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = "chat_template.jinja"  # in a model's folder
PLAIN_CHAT = Path(__file__).with_name("plain_chat.jinja")
