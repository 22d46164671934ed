"""Every setting that accelerate launch exports is obeyed or refused by name."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import launch

from dqo.config import launcher
from dqo.config.options import load_options, options_of
from dqo.errors import UserError
from tests.dqo.helpers import arguments

ROOT = Path(__file__).parents[3]
OURS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")


def exported_names():
    """Names that the functions of accelerate.utils.launch put into the environment, read from their code."""
    found = set()
    for function in ast.walk(ast.parse(inspect.getsource(launch))):
        if not isinstance(function, ast.FunctionDef):
            continue
        prefix = ""
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "prefix":
                prefix = node.value.value
        for node in ast.walk(function):
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("current_env", "environment"):
                key = node.slice
                if isinstance(key, ast.BinOp):
                    found.add(prefix + key.right.value)
                elif isinstance(key, ast.Constant):
                    found.add(key.value)
    return sorted(name for name in found if name.startswith(OURS))


def test_the_names_are_found():
    names = exported_names()
    assert len(names) > 60
    assert {"ACCELERATE_MIXED_PRECISION", "FSDP_VERSION", "PARALLELISM_CONFIG_TP_SIZE", "MEGATRON_LM_TP_DEGREE"} <= set(
        names
    )


@pytest.mark.parametrize("name", exported_names())
def test_what_the_launcher_exports_is_known(name):
    assert launcher.known(name)


def environment_of(*flags, prepare=launch.prepare_multi_gpu_env):
    args = launch_command_parser().parse_args([*flags, "script.py"])
    args.mixed_precision = args.mixed_precision or "no"
    args.dynamo_backend = args.dynamo_backend or "no"
    args.num_processes, args.num_machines, args.num_cpu_threads_per_process = 2, 1, 1
    made = prepare(args)
    made = made[1] if isinstance(made, tuple) else made
    return {name: value for name, value in made.items() if name.startswith(OURS)}


FSDP2 = ("--use_fsdp", "--fsdp_version", "2")


@pytest.mark.parametrize(
    "flags, changes",
    [
        ((), {}),
        (("--mixed_precision", "bf16"), {"bf16": True}),
        (FSDP2, {"fsdp": True}),
        ((*FSDP2, "--fsdp_activation_checkpointing", "true"), {"fsdp": True, "gradient_checkpointing": True}),
        ((*FSDP2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"), {"fsdp": True}),
        ((*FSDP2, "--fsdp_offload_params", "true"), {"fsdp": True, "fsdp_cpu_offload": True}),
        ((*FSDP2, "--fsdp_state_dict_type", "SHARDED_STATE_DICT"), {"fsdp": True}),
        (("--enable_cpu_affinity",), {}),
    ],
)
def test_what_the_launcher_really_exports_is_obeyed(flags, changes):
    options = options_of({}, "test")
    obeyed = launcher.obey(options, environment_of(*flags))
    different = {name: value for name, value in obeyed.flat().items() if value != options.flat()[name]}
    assert different == changes
    assert launcher.obey(obeyed, environment_of(*flags)).flat() == obeyed.flat()


def test_the_launcher_of_one_process_is_obeyed():
    environment = environment_of("--cpu", prepare=launch.prepare_simple_launcher_cmd_env)
    assert launcher.obey(options_of({}, "test"), environment).train.use_cpu
    assert not launcher.obey(options_of({}, "test"), environment | {"ACCELERATE_USE_CPU": "False"}).train.use_cpu


def test_several_processes_of_which_the_launcher_started_one_are_refused():
    """As on a CPU without its option multi_gpu."""
    args = launch_command_parser().parse_args(["--cpu", "script.py"])
    args.mixed_precision, args.dynamo_backend, args.num_machines, args.num_cpu_threads_per_process = "no", "no", 1, 1
    made = {}
    for args.num_processes in (1, 2):
        _, environment = launch.prepare_simple_launcher_cmd_env(args)
        names = [name for name in environment if name.startswith(OURS) or name.startswith("MASTER_")]
        made[args.num_processes] = {name: environment[name] for name in names}
    launcher.obey(options_of({}, "test"), made[1])
    with pytest.raises(
        UserError, match=r"several processes \(MASTER_ADDR=127.0.0.1 is set\) and started one: .*--multi_gpu"
    ):
        launcher.obey(options_of({}, "test"), made[2])
    with pytest.raises(UserError, match="started one"):  # whatever the command
        launcher.whole_models("dqo sample", made[2])
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        launcher.obey(options_of({}, "test"), made[2] | {name: "2"})


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--mixed_precision", "fp16"), r"ACCELERATE_MIXED_PRECISION=fp16 .*only no and bf16"),
        (("--use_fsdp", "--fsdp_version", "1"), r"FSDP_VERSION=1 .*add --fsdp_version 2"),
        (("--use_fsdp",), r"FSDP_VERSION=1 .*add --fsdp_version 2"),
        ((*FSDP2, "--fsdp_reshard_after_forward", "false"), "FSDP_RESHARD_AFTER_FORWARD=false"),
        ((*FSDP2, "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"), "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP"),
        ((*FSDP2, "--fsdp_sharding_strategy", "SHARD_GRAD_OP"), "FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP"),
        ((*FSDP2, "--fsdp_activation_checkpointing_offload", "true"), "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true"),
        (("--use_megatron_lm",), "ACCELERATE_USE_MEGATRON_LM=true .*not supported"),
        (("--dynamo_backend", "inductor"), "ACCELERATE_DYNAMO_BACKEND=INDUCTOR .*dynamo_backend to no"),
        ((*FSDP2, "--use_parallelism_config", "--parallelism_config_tp_size", "2"), "PARALLELISM_CONFIG_TP_SIZE=2"),
        ((*FSDP2, "--use_parallelism_config", "--parallelism_config_cp_size", "2"), "PARALLELISM_CONFIG_CP_SIZE=2"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        launcher.obey(options_of({}, "test"), environment_of(*flags))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true .*DeepSpeed is not supported"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE=3"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8"),
        ({"ACCELERATE_FP8_BACKEND": "TE"}, "ACCELERATE_FP8_BACKEND=TE .*fp8 is not supported"),
        ({"ACCELERATE_USE_FSDP": "perhaps"}, "ACCELERATE_USE_FSDP=perhaps: expected true or false"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "two"},
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=two: expected a number",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "gradient_accumulation_steps must be at least 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_IGNORED_MODULES": "lm_head"}, "FSDP_IGNORED_MODULES=lm_head"),
        ({"ACCELERATE_IN_TPU_POD": "1"}, "ACCELERATE_IN_TPU_POD=1 .*TPUs"),
    ],
)
def test_settings_of_the_environment_alone_are_refused(environment, message):
    with pytest.raises(UserError, match=message):
        launcher.obey(options_of({}, "test"), environment)


def test_accumulation_and_clipping_are_obeyed_and_may_not_contradict():
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    obeyed = launcher.obey(options_of({}, "test"), environment).train
    assert (obeyed.gradient_accumulation_steps, obeyed.max_grad_norm) == (4, 0.5)
    launcher.obey(load_options(["--gradient_accumulation_steps", "4"]), environment)
    with pytest.raises(UserError, match=r"STEPS=4 .*gradient_accumulation_steps 2 \(from --gradient_acc.*contradict"):
        launcher.obey(load_options(["--gradient_accumulation_steps", "2"]), environment)
    auto = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}
    assert launcher.obey(options_of({}, "test"), auto).train.gradient_accumulation_steps == 1


def test_bf16_that_was_refused_by_an_option_is_a_contradiction():
    with pytest.raises(UserError, match=r"bf16 False \(from DQOConfig\) contradict each other"):
        launcher.obey(options_of({"bf16": False}, "DQOConfig"), {"ACCELERATE_MIXED_PRECISION": "bf16"})


def test_a_setting_that_nobody_knows_is_named_once(caplog):
    environment = {"ACCELERATE_MADE_UP": "7", "ACCELERATE_LOG_LEVEL": "INFO"}
    for _ in range(2):
        launcher.obey(options_of({}, "test"), environment)
    assert [r.getMessage() for r in caplog.records] == [
        "ACCELERATE_MADE_UP=7: this setting of accelerate is not known, and has no effect"
    ]


def test_settings_of_fsdp_count_only_under_its_switch():
    launcher.obey(options_of({}, "test"), {"FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true"})
    assert launcher.blocks_to_shard({"FSDP_TRANSFORMER_CLS_TO_WRAP": "A"}) == set()
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B"}
    assert launcher.blocks_to_shard(asked) == {"A", "B"}


def test_the_command_refuses_before_it_reads_a_file(files):
    command = [sys.executable, "-m", "dqo.train", *arguments(files, dataset_name=files / "nowhere.jsonl")]
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ACCELERATE_USE_DEEPSPEED=true (a setting of accelerate): DeepSpeed is not")
    assert not (files / "out").exists()


def test_bf16_of_the_launcher_is_the_bf16_of_the_run(files, monkeypatch):
    from dqo.train.run import begin

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = begin(load_options(arguments(files)))
    assert trainer.learner.bf16
    assert "bf16: true" in (files / "out" / "config.yaml").read_text()
