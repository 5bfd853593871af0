"""Imported last by the fork server: what it has made by then its forks neither make nor collect."""

import gc
from pathlib import Path

from peer import config_dict

from qwen35.data.chat_template import ChatTemplate
from qwen35.model import load_config

load_config(config_dict())
ChatTemplate.from_folder(Path(__file__).parent / "fixtures/templates")  # as tokenizer_fixture.py copies it
gc.collect()
gc.freeze()
