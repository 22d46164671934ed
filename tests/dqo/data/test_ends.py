import pytest

from dqo.data.ends import Ends, ends_of, template_end
from dqo.errors import UserError
from dqo.models.named import stop_ids
from tests.dqo.helpers import policy, tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
NO_ANSWERS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
REFUSES = "{{ raise_exception('no') }}"


def chat(template, *more):
    tok = tokenizer()
    tok.add_special_tokens({"extra_special_tokens": list(more)})
    tok.chat_template = template
    return tok


@pytest.mark.parametrize(
    "template, end",
    [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (LLAMA_3, "<|eot_id|>"), (LLAMA_2, "<eos>")],
)
def test_the_end_that_the_template_writes_is_trained_on_messages_and_stops_everywhere(template, end):
    tok = chat(template, "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|stop|>")
    written, eos = tok.convert_tokens_to_ids(end), tok.eos_token_id
    assert ends_of(tok, messages=True) == Ends(written, frozenset({written, eos}))
    assert ends_of(tok, messages=False) == Ends(eos, frozenset({written, eos}))


@pytest.mark.parametrize("template", [None, NO_ANSWERS, REFUSES, "{{ messages[1].content }}"])
def test_without_an_end_of_the_template_it_is_the_tokenizers(template):
    tok = chat(template)
    assert template_end(tok) is None
    assert ends_of(tok, [7, 9], messages=True) == Ends(tok.eos_token_id, frozenset({tok.eos_token_id, 7, 9}))


def test_a_tokenizer_without_any_end_is_refused():
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(UserError, match="no eos_token; a response could never end"):
        ends_of(tok)


@pytest.mark.parametrize("written, found", [(None, []), (5, [5]), ([5, 6], [5, 6])])
def test_the_stop_ids_are_those_of_the_models_own_generation_config(written, found, tmp_path):
    model = policy()
    model.generation_config.eos_token_id = written
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path)
    assert stop_ids(model) == stop_ids(str(tmp_path)) == found
    model.generation_config._from_model_config = True  # an id of the class's defaults
    assert stop_ids(model) == []
    assert stop_ids(str(tmp_path / "nowhere")) == []
