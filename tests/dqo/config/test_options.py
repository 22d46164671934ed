import pytest

from dqo.config.options import dump_options, load_options
from dqo.errors import UserError
from dqo.objectives import OBJECTIVES


def yaml_file(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("beta: 0.3\nlam: 0.5\nlearning_rate: 1e-5\n")
    second.write_text("lam: 0.7\n")
    options = load_options(["--config", str(first), str(second), "--beta", "0.2"])
    assert (options.objective.beta, options.objective.lam, options.train.learning_rate) == (0.2, 0.7, 1e-5)


def test_the_resolved_options_reproduce_themselves(tmp_path):
    options = load_options(["--method", "dqo", "--is_cap", "None", "--lam", "0.9", "--dataset_name", "x.jsonl"])
    again = load_options(["--config", yaml_file(tmp_path, dump_options(options))])
    assert again.flat() == options.flat()


def test_the_flags_of_the_method_are_offered_and_no_others():
    assert load_options(["--method", "dpo", "--max_pairs_per_prompt", "2"]).objective.max_pairs_per_prompt == 2
    with pytest.raises(UserError, match="unknown option '--lam'.* lam is an option of method dqo"):
        load_options(["--method", "dpo", "--lam", "0.5"])


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_objective_is_a_method_and_its_options_reproduce_themselves(method, tmp_path):
    options = load_options(["--method", method])
    assert options.objective == OBJECTIVES[method]() and options.train.method == method
    again = load_options(["--config", yaml_file(tmp_path, dump_options(options))])
    assert again.flat() == options.flat()


def test_an_unknown_key_is_refused_with_line_and_suggestion(tmp_path):
    path = yaml_file(tmp_path, "# a comment\nmethod: dpo\nlerning_rate: 3\n")
    with pytest.raises(UserError, match=r"c\.yaml:3: unknown option 'lerning_rate'. Did you mean 'learning_rate'\?"):
        load_options(["--config", path])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lam", "1.5"], r"lam must be in \[0, 1\], got 1.5 \(from --lam\)"),
        (["--beta", "0"], r"beta must be positive, got 0.0 \(from --beta\)"),
        (["--method", "dpoo"], r"method must be one of .* got 'dpoo' \(from --method\). Did you mean 'dpo'\?"),
        (["--max_steps", "3", "--num_train_epochs", "2"], "both set; remove one"),
        (["--eval_fraction", "1"], r"eval_fraction must be in \[0, 1\)"),
        (["--eval_tasks", "x.jsonl"], "verifier must be set when eval_tasks is given"),
        (["--is_cap", "0", "--is_floor", "1"], "is_floor must be at most is_cap"),
        (["--method", "dpo", "--max_pairs_per_prompt", "0"], "max_pairs_per_prompt must be at least 1"),
        (["--method", "rft", "--max_per_prompt", "0"], "max_per_prompt must be at least 1"),
        (["--method", "kto", "--undesirable_weight", "-1"], "undesirable_weight must be at least 0, got -1.0"),
        (["--method", "dro", "--beta", "0"], "beta must be positive"),
        (["--method", "oreo", "--alpha", "-1"], "alpha must be at least 0"),
        (["--target_ema", "0.9", "--value_model", "none"], "target_ema must be None with value_model none"),
        (["--learning_rate", "-1"], "learning_rate must be positive"),
        (["--max_batch_tokens", "0"], "max_batch_tokens must be at least 1"),
    ],
)
def test_values_out_of_range_are_named_with_their_source(arguments, message):
    with pytest.raises(UserError, match=message):
        load_options(arguments)


@pytest.mark.parametrize(
    "line, message",
    [
        ("max_steps: 3.5", "c.yaml:1: max_steps must be int, got 3.5"),
        ("seed: true", "c.yaml:1: seed must be int, got True"),
        ("beta: high", "c.yaml:1: beta must be float, got 'high'"),
        ("policy_target: paper", "c.yaml:1: policy_target must be .*one_step.*got 'paper'"),
        ("lam: 1.5", r"lam must be in \[0, 1\], got 1.5 \(from .*c.yaml:1\)"),
        ("- lam", "c.yaml:1: expected a mapping"),
        ("lam: [1", "not valid YAML"),
    ],
)
def test_values_of_files_are_checked_with_their_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        load_options(["--config", yaml_file(tmp_path, line + "\n")])


@pytest.mark.parametrize("name", ["warmup_steps", "value_warmup_steps"])
def test_a_number_of_steps_is_a_share_or_whole(name):
    for value in ("0.5", "3", "3.0"):
        assert getattr(load_options([f"--{name}", value]).train, name) == float(value)
    with pytest.raises(
        UserError, match=f"{name} must be a share of all steps below 1, or a whole number of steps, got 1.5"
    ):
        load_options([f"--{name}", "1.5"])


def test_the_budget_of_a_micro_batch_is_that_of_its_longest_responses_unless_given():
    arguments = ["--per_device_train_batch_size", "3", "--max_length", "50"]
    assert load_options(arguments).train.batch_tokens("cpu") == 150
    assert load_options([*arguments, "--max_batch_tokens", "70"]).train.batch_tokens("cpu") == 70
    large = load_options(["--per_device_train_batch_size", "16", "--max_length", "1024"]).train
    assert (large.batch_tokens("cuda"), large.batch_tokens("cpu")) == (16384, 4096)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.yaml: cannot be read"):
        load_options(["--config", str(tmp_path / "absent.yaml")])
