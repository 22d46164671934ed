import types

import pytest
import torch

from dqo.config.options import load_options
from dqo.train.run import begin
from dqo.train.run_models import bf16_problem
from tests.dqo.helpers import arguments


@pytest.mark.parametrize("supported", [True, False])
def test_a_device_without_bfloat16_is_said_and_does_not_end_the_run(files, monkeypatch, caplog, supported):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: supported))
    begin(load_options([*arguments(files), "--bf16"])).recorder.close()
    said = [r.getMessage() for r in caplog.records if "this CPU has no instructions for bfloat16" in r.getMessage()]
    assert len(said) == (not supported)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    on_gpu = bf16_problem(torch.device("cuda"))
    assert on_gpu is None if supported else "this GPU has no products in bfloat16" in str(on_gpu)


def test_a_run_in_float32_says_nothing_of_it(files, caplog):
    begin(load_options(arguments(files))).recorder.close()
    assert "bfloat16" not in caplog.text
