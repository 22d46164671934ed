"""The table of architectures: a part of its rows is made, and what it would say of a faulty class."""

import pytest

from benchmarks.trainer import architectures

# Dropout by other means, factors, several parts, experts, states in the place of attention, linear biases, shared layers. That
# every class equals itself in training mode, and when its layers are recomputed, is in tests/dqo/models/test_architecture.py.
TRAINED = ["llama", "opt", "bloom", "gpt2", "gpt_bigcode", "xglm", "falcon", "phi", "mpt", "gemma2", "gemma4_text"]
TRAINED += ["qwen3_5", "granite", "cohere2", "mixtral", "qwen2_moe", "lfm2", "recurrent_gemma", "xlstm"]
# Adapters on layers of several kinds: fused, transposed, of experts, of states. Without a value model a class trains as with one.
# Recomputed are layers of each kind.
SOME = {
    "checkpointing": {"llama", "falcon", "gemma4_text", "qwen3_5", "mixtral", "recurrent_gemma", "xlstm"},
    "LoRA": {"llama", "bloom", "gpt2", "gemma4_text", "mixtral", "lfm2", "recurrent_gemma", "xlstm"},
    "trains": {"llama"},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRAINED)
def test_an_architecture_is_trained_in_every_way(model_type, tmp_path):
    columns = [name for name in architectures.COLUMNS if model_type in SOME.get(name, {model_type})]
    cells = architectures.row_of(model_type, tmp_path, columns)
    assert {column: cells.get(column) for column in columns} == dict.fromkeys(columns, "yes")


@pytest.mark.slow
def test_the_table_says_what_is_refused_and_what_fails(tmp_path, monkeypatch):
    rows = {"bert": architectures.row_of("bert", tmp_path / "bert"), "fuyu": architectures.row_of("fuyu", tmp_path)}
    assert rows["bert"]["trains"].startswith("refused: BertLMHeadModel is not causal")
    assert rows["fuyu"]["trains"].startswith("not built: ")
    rows["modernbert-decoder"] = architectures.row_of("modernbert-decoder", tmp_path / "modernbert")
    assert rows["modernbert-decoder"]["trains"].startswith(
        "refused: ModernBertDecoderForCausalLM does more to its logits"
    )
    rows["reformer"] = architectures.row_of("reformer", tmp_path / "reformer")
    assert rows["reformer"]["trains"].startswith(
        "refused: ReformerModelWithLMHead cannot be run on token ids alone (If you want"
    )
    rows["trocr"] = architectures.row_of("trocr", tmp_path / "trocr")
    assert rows["trocr"]["trains"] == "yes"
    assert rows["trocr"]["value model"].startswith("refused: transformers has no model of type trocr without its head")
    monkeypatch.setattr("dqo.models.policy.disable_dropout", lambda model: model.train())
    rows["opt"] = architectures.row_of("opt", tmp_path / "opt")
    assert rows["opt"]["trains"].startswith("refused: OPTForCausalLM gives one row two results")
    lines = architectures.table(rows).splitlines()
    assert len(lines) == 8 and all(line.count("|") == 7 for line in lines)
