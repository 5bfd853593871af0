"""A model folder and its tokenizers, ours and transformers', for files that bring none."""

import pytest
from tokenizer_fixture import make_model_folder

from qwen35.data.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def hf_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
